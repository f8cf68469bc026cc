-- A row for each Immunization that was not entered in error, also for one that was not done.
select
    {{ source_key('i._source', 'i.id') }} as immunization_id,
    {{ source_key('i._source', 'i.patient_key') }} as person_id,
    {{ source_key('i._source', 'i.patient_key') }} as patient_id,
    {{ source_key('i._source', 'i.encounter_key') }} as encounter_id,
    case when i.cvx_code is not null then 'cvx' else coalesce(s.code_type, i.vaccine_system) end as source_code_type,
    coalesce(i.cvx_code, i.vaccine_code) as source_code,
    coalesce(i.vaccine_display, i.vaccine_text) as source_description,
    i.status as status,
    coalesce(i.status_reason_code, i.status_reason_display, i.status_reason_text) as status_reason,
    coalesce(i.occurrence_date_time_date, i.recorded_date) as occurrence_date,
    {{ quantity_text('i.dose_quantity_value', 'coalesce(i.dose_quantity_unit, i.dose_quantity_code)') }} as source_dose,
    i.lot_number as lot_number,
    coalesce(i.site_code, i.site_display, i.site_text) as body_site,
    coalesce(i.route_code, i.route_display, i.route_text) as route,
    {{ source_key('i._source', 'i.location_key') }} as location_id,
    {{ source_key('i._source', 'i.practitioner_key') }} as practitioner_id,
    cast(i.loaded_at as timestamp) as ingest_datetime,
    i._source as data_source
from {{ ref('stg_immunization') }} i
left join {{ ref('code_systems') }} s on s.system = i.vaccine_system
where coalesce(i.status, '') <> 'entered-in-error'
