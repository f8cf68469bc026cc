-- A row for each Coverage that was neither cancelled nor entered in error.
select
    {{ source_key('c._source', 'c.patient_key') }} as person_id,
    coalesce(c.member_id, c.subscriber_id, c.identifier_value) as member_id,
    coalesce(c.subscriber_id, {{ source_key('c._source', 'c.subscriber_key') }}) as subscriber_id,
    coalesce(p.gender, 'unknown') as gender,
    lower(coalesce(p.race_display, p.race_text, 'unknown')) as race,
    p.birth_date as birth_date,
    p.deceased_date_time_date as death_date,
    case when p.deceased_boolean or p.deceased_date_time is not null then 1 else 0 end as death_flag,
    c.period_start_date as enrollment_start_date,
    c.period_end_date as enrollment_end_date,
    coalesce(o.name, c.payor_display, 'unknown') as payer,
    coalesce(c.type_display, c.type_text, c.type_code) as payer_type,
    coalesce(c.plan_name, c.plan_value, o.name, c.payor_display, 'unknown') as plan,
    cast(null as text) as original_reason_entitlement_code,
    cast(null as text) as dual_status_code,
    cast(null as text) as medicare_status_code,
    c.group_value as group_id,
    c.group_name as group_name,
    p.given as first_name,
    p.family as last_name,
    p.ssn as social_security_number,
    coalesce(c.relationship_display, c.relationship_code) as subscriber_relation,
    p.address_line as address,
    p.address_city as city,
    p.address_state as state,
    p.address_postal_code as zip_code,
    p.phone as phone,
    c._source as data_source,
    cast(null as text) as file_name,
    cast(null as date) as file_date,
    cast(c.loaded_at as timestamp) as ingest_datetime
from {{ ref('stg_coverage') }} c
left join {{ ref('stg_patient') }} p on p.id = c.patient_key and p._source = c._source
left join {{ ref('stg_organization') }} o on o.id = c.payor_key and o._source = c._source
where coalesce(c.status, '') not in ('cancelled', 'draft', 'entered-in-error')
