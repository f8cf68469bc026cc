-- A row for each Encounter that took place: neither planned, cancelled nor entered in error.
with diagnoses as (
    select
        d._source,
        d.encounter_key,
        coalesce(s.code_type, c.code_system) as code_type,
        c.code,
        row_number() over (partition by d._source, d.encounter_key order by d.rank nulls last, d."index") as position
    from {{ ref('stg_encounter_diagnosis') }} d
    join {{ ref('stg_condition') }} c on c.id = d.condition_key and c._source = d._source
    left join {{ ref('code_systems') }} s on s.system = c.code_system
    where coalesce(c.verification_status, '') not in ('refuted', 'entered-in-error')
)

select
    {{ source_key('e._source', 'e.id') }} as encounter_id,
    {{ source_key('e._source', 'e.patient_key') }} as person_id,
    {{ source_key('e._source', 'e.patient_key') }} as patient_id,
    case e.class_code when 'IMP' then 'acute inpatient' when 'ACUTE' then 'acute inpatient' when 'EMER' then 'emergency department' when 'HH' then 'home health' when 'VR' then 'telehealth' when 'AMB' then 'office visit' else 'other' end as encounter_type,
    e.period_start_date as encounter_start_date,
    e.period_end_date as encounter_end_date,
    e.admit_source_code as admit_source_code,
    e.priority_code as admit_type_code,
    e.discharge_disposition_code as discharge_disposition_code,
    {{ source_key('e._source', 'e.practitioner_key') }} as attending_provider_id,
    nullif(trim(coalesce(w.given, '') || ' ' || coalesce(w.family, '')), '') as attending_provider_name,
    o.npi as facility_npi,
    coalesce(o.name, e.service_provider_display) as facility_name,
    case when d.code is not null then d.code_type when e.reason_code is not null then coalesce(s.code_type, e.reason_system) end as primary_diagnosis_code_type,
    coalesce(d.code, e.reason_code) as primary_diagnosis_code,
    cast(null as text) as drg_code_type,
    cast(null as text) as drg_code,
    cast(null as numeric) as paid_amount,
    cast(null as numeric) as allowed_amount,
    cast(null as numeric) as charge_amount,
    cast(e.loaded_at as timestamp) as ingest_datetime,
    e._source as data_source
from {{ ref('stg_encounter') }} e
left join diagnoses d on d.encounter_key = e.id and d._source = e._source and d.position = 1
left join {{ ref('stg_practitioner') }} w on w.id = e.practitioner_key and w._source = e._source
left join {{ ref('stg_organization') }} o on o.id = e.service_provider_key and o._source = e._source
left join {{ ref('code_systems') }} s on s.system = e.reason_system
where coalesce(e.status, '') not in ('planned', 'cancelled', 'entered-in-error')
