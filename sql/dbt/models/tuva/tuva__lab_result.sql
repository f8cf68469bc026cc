-- A row for each value of laboratory results, with the first order that it is based on.
select
    {{ source_key('v._source', 'v.id') }} as lab_result_id,
    {{ source_key('v._source', 'v.patient_key') }} as person_id,
    {{ source_key('v._source', 'v.patient_key') }} as patient_id,
    {{ source_key('v._source', 'v.encounter_key') }} as encounter_id,
    n.accession_identifier as accession_number,
    case when q.code is not null then coalesce(t.code_type, q.code_system) else coalesce(y.code_type, v.panel_system) end as source_order_type,
    coalesce(q.code, v.panel_code) as source_order_code,
    case when q.code is not null then coalesce(q.code_display, q.code_text) when v.panel_code is not null then v.panel_text else coalesce(q.code_display, q.code_text, v.panel_text) end as source_order_description,
    coalesce(s.code_type, v.code_system) as source_component_type,
    v.code as source_component_code,
    v.code_text as source_component_description,
    v.status as status,
    v.value_text as result,
    coalesce({{ local_time('v.issued') }}, v.moment) as result_datetime,
    coalesce({{ local_time('n.collected_start') }}, {{ local_time('v.effective_start') }}) as collection_datetime,
    coalesce(v.value_quantity_unit, v.value_quantity_code) as source_units,
    case when v.value_quantity_system = 'http://unitsofmeasure.org' then v.value_quantity_code end as normalized_units,
    {{ number_text('v.range_low') }} as source_reference_range_low,
    {{ number_text('v.range_high') }} as source_reference_range_high,
    cast(null as text) as normalized_reference_range_low,
    cast(null as text) as normalized_reference_range_high,
    v.interpretation_code as source_abnormal_code,
    cast(null as text) as normalized_abnormal_code,
    coalesce(n.type_display, n.type_text, n.type_code) as specimen,
    {{ source_key('v._source', 'q.requester_key') }} as ordering_practitioner_id,
    cast(v.loaded_at as timestamp) as ingest_datetime,
    v._source as data_source
from {{ ref('observation_values') }} v
left join {{ ref('stg_specimen') }} n on n.id = v.specimen_key and n._source = v._source
left join {{ ref('stg_service_request') }} q on q.id = v.service_request_key and q._source = v._source
left join {{ ref('code_systems') }} s on s.system = v.code_system
left join {{ ref('code_systems') }} t on t.system = q.code_system
left join {{ ref('code_systems') }} y on y.system = v.panel_system
where v.is_laboratory
