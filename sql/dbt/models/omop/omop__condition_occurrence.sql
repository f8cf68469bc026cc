-- A row for each Condition that was neither refuted nor entered in error, and each of its standard concepts.
select
    {{ stable_id('Condition', 'c._source', "c.id || '|' || coalesce(m.ordinal, 1)") }} as condition_occurrence_id,
    {{ stable_id('Patient', 'c._source', 'c.patient_key') }} as person_id,
    coalesce(m.concept_id, 0) as condition_concept_id,
    coalesce(c.onset_start_date, c.recorded_date_date) as condition_start_date,
    coalesce({{ local_time('c.onset_start') }}, {{ local_time('c.recorded_date') }}) as condition_start_datetime,
    coalesce(c.abatement_end_date, c.abatement_start_date) as condition_end_date,
    coalesce({{ local_time('c.abatement_end') }}, {{ local_time('c.abatement_start') }}) as condition_end_datetime,
    32817 as condition_type_concept_id,
    case c.verification_status when 'confirmed' then 32893 when 'provisional' then 32899 when 'differential' then 32899 else 0 end as condition_status_concept_id,
    cast(null as text) as stop_reason,
    {{ stable_id('Practitioner', 'c._source', 'coalesce(c.asserter_key, c.recorder_key)') }} as provider_id,
    {{ stable_id('Encounter', 'c._source', 'c.encounter_key') }} as visit_occurrence_id,
    cast(null as bigint) as visit_detail_id,
    coalesce(c.code, c.code_text) as condition_source_value,
    coalesce(m.source_concept_id, 0) as condition_source_concept_id,
    c.verification_status as condition_status_source_value
from {{ ref('stg_condition') }} c
left join {{ ref('concept_map') }} m on m.system = c.code_system and m.code = c.code
where coalesce(c.verification_status, '') not in ('refuted', 'entered-in-error')
