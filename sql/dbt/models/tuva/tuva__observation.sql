-- A row for each value of Observations that are not laboratory results.
select
    {{ source_key('v._source', 'v.id') }} as observation_id,
    {{ source_key('v._source', 'v.patient_key') }} as person_id,
    {{ source_key('v._source', 'v.patient_key') }} as patient_id,
    {{ source_key('v._source', 'v.encounter_key') }} as encounter_id,
    {{ source_key('v._source', 'v.panel_id') }} as panel_id,
    v.day as observation_date,
    v.category as observation_type,
    coalesce(s.code_type, v.code_system) as source_code_type,
    v.code as source_code,
    v.code_text as source_description,
    v.value_text as result,
    coalesce(v.value_quantity_unit, v.value_quantity_code) as source_units,
    case when v.value_quantity_system = 'http://unitsofmeasure.org' then v.value_quantity_code end as normalized_units,
    {{ number_text('v.range_low') }} as source_reference_range_low,
    {{ number_text('v.range_high') }} as source_reference_range_high,
    cast(null as text) as normalized_reference_range_low,
    cast(null as text) as normalized_reference_range_high,
    cast(v.loaded_at as timestamp) as ingest_datetime,
    v._source as data_source
from {{ ref('observation_values') }} v
left join {{ ref('code_systems') }} s on s.system = v.code_system
where not v.is_laboratory
