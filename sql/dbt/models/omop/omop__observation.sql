-- A row for each value of all other Observations, and each standard concept of its code.
select
    {{ stable_id('Observation', 'v._source', "v.id || '|' || coalesce(m.ordinal, 1)") }} as observation_id,
    {{ stable_id('Patient', 'v._source', 'v.patient_key') }} as person_id,
    coalesce(m.concept_id, 0) as observation_concept_id,
    v.day as observation_date,
    v.moment as observation_datetime,
    32817 as observation_type_concept_id,
    v.number as value_as_number,
    case when v.number is null then v.value_text end as value_as_string,
    case when coalesce(v.value_concept_code, v.value_concept_text) is not null then coalesce(a.concept_id, 0) end as value_as_concept_id,
    case when v.interpretation_code is not null then coalesce(q.concept_id, 0) end as qualifier_concept_id,
    case when coalesce(v.value_quantity_code, v.value_quantity_unit) is not null then coalesce(u.concept_id, 0) end as unit_concept_id,
    {{ stable_id('Practitioner', 'v._source', 'v.practitioner_key') }} as provider_id,
    {{ stable_id('Encounter', 'v._source', 'v.encounter_key') }} as visit_occurrence_id,
    cast(null as bigint) as visit_detail_id,
    coalesce(v.code, v.code_text) as observation_source_value,
    coalesce(m.source_concept_id, 0) as observation_source_concept_id,
    coalesce(v.value_quantity_code, v.value_quantity_unit) as unit_source_value,
    v.interpretation_code as qualifier_source_value,
    v.value_text as value_source_value,
    cast(null as bigint) as observation_event_id,
    cast(null as integer) as obs_event_field_concept_id
from {{ ref('observation_values') }} v
left join {{ ref('concept_map') }} m on m.system = v.code_system and m.code = v.code
left join {{ ref('first_concept') }} a on a.system = v.value_concept_system and a.code = v.value_concept_code
left join {{ ref('first_concept') }} u on u.system = v.value_quantity_system and u.code = v.value_quantity_code
left join {{ ref('first_concept') }} q on q.system = 'http://snomed.info/sct' and q.code = v.interpretation_code
where not v.is_measurement
