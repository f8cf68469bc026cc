-- A row for each Specimen of a Patient that was not entered in error, and each standard concept of its material.
with specimens as (
    select
        n.*,
        case when n.type_snomed_code is not null then 'http://snomed.info/sct' else n.type_system end as system,
        coalesce(n.type_snomed_code, n.type_code) as code
    from {{ ref('stg_specimen') }} n
    where n.patient_key is not null
        and coalesce(n.status, '') <> 'entered-in-error'
)

select
    {{ stable_id('Specimen', 's._source', "s.id || '|' || coalesce(m.ordinal, 1)") }} as specimen_id,
    {{ stable_id('Patient', 's._source', 's.patient_key') }} as person_id,
    coalesce(m.concept_id, 0) as specimen_concept_id,
    32817 as specimen_type_concept_id,
    coalesce(s.collected_start_date, s.received_time_date) as specimen_date,
    coalesce({{ local_time('s.collected_start') }}, {{ local_time('s.received_time') }}) as specimen_datetime,
    s.quantity_value as quantity,
    case when coalesce(s.quantity_code, s.quantity_unit) is not null then coalesce(u.concept_id, 0) end as unit_concept_id,
    case when coalesce(s.body_site_code, s.body_site_text) is not null then coalesce(b.concept_id, 0) end as anatomic_site_concept_id,
    cast(null as integer) as disease_status_concept_id,
    s.id as specimen_source_id,
    coalesce(s.code, s.type_text) as specimen_source_value,
    coalesce(s.quantity_code, s.quantity_unit) as unit_source_value,
    coalesce(s.body_site_code, s.body_site_text) as anatomic_site_source_value,
    cast(null as text) as disease_status_source_value
from specimens s
left join {{ ref('concept_map') }} m on m.system = s.system and m.code = s.code
left join {{ ref('first_concept') }} u on u.system = 'http://unitsofmeasure.org' and u.code = s.quantity_code
left join {{ ref('first_concept') }} b on b.system = s.body_site_system and b.code = s.body_site_code
