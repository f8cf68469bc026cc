-- A row for each value of laboratory results and vital signs, and each standard concept of its code.
select
    {{ stable_id('Observation', 'v._source', "v.id || '|' || coalesce(m.ordinal, 1)") }} as measurement_id,
    {{ stable_id('Patient', 'v._source', 'v.patient_key') }} as person_id,
    coalesce(m.concept_id, 0) as measurement_concept_id,
    v.day as measurement_date,
    v.moment as measurement_datetime,
    substr(cast(v.moment as text), 12, 8) as measurement_time,
    32817 as measurement_type_concept_id,
    case when v.number is not null then case v.value_quantity_comparator when '<' then 4171756 when '<=' then 4171754 when '>' then 4172704 when '>=' then 4171755 else 4172703 end end as operator_concept_id,
    v.number as value_as_number,
    case when coalesce(v.value_concept_code, v.value_concept_text) is not null then coalesce(a.concept_id, 0) end as value_as_concept_id,
    case when coalesce(v.value_quantity_code, v.value_quantity_unit) is not null then coalesce(u.concept_id, 0) end as unit_concept_id,
    v.range_low as range_low,
    v.range_high as range_high,
    {{ stable_id('Practitioner', 'v._source', 'v.practitioner_key') }} as provider_id,
    {{ stable_id('Encounter', 'v._source', 'v.encounter_key') }} as visit_occurrence_id,
    cast(null as bigint) as visit_detail_id,
    coalesce(v.code, v.code_text) as measurement_source_value,
    coalesce(m.source_concept_id, 0) as measurement_source_concept_id,
    coalesce(v.value_quantity_code, v.value_quantity_unit) as unit_source_value,
    coalesce(u.source_concept_id, 0) as unit_source_concept_id,
    v.value_text as value_source_value,
    cast(null as bigint) as measurement_event_id,
    cast(null as integer) as meas_event_field_concept_id
from {{ ref('observation_values') }} v
left join {{ ref('concept_map') }} m on m.system = v.code_system and m.code = v.code
left join {{ ref('first_concept') }} a on a.system = v.value_concept_system and a.code = v.value_concept_code
left join {{ ref('first_concept') }} u on u.system = v.value_quantity_system and u.code = v.value_quantity_code
where v.is_measurement
