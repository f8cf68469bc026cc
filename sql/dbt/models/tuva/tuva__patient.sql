-- A row for each Patient.
select
    {{ source_key('p._source', 'p.id') }} as person_id,
    {{ source_key('p._source', 'p.id') }} as patient_id,
    p.given as first_name,
    cast(null as text) as middle_name,
    p.family as last_name,
    p.suffix as name_suffix,
    coalesce(p.gender, 'unknown') as sex,
    lower(coalesce(p.race_display, p.race_text, 'unknown')) as race,
    p.ethnicity_code as ethnicity,
    p.birth_date as birth_date,
    p.deceased_date_time_date as death_date,
    case when p.deceased_boolean or p.deceased_date_time is not null then 1 else 0 end as death_flag,
    p.ssn as social_security_number,
    p.address_line as address,
    p.address_city as city,
    p.address_state as state,
    p.address_postal_code as zip_code,
    p.address_district as county,
    {{ number_or_null('a.latitude') }} as latitude,
    {{ number_or_null('a.longitude') }} as longitude,
    p.phone as phone,
    p.email as email,
    cast(p.loaded_at as timestamp) as ingest_datetime,
    p._source as data_source
from {{ ref('stg_patient') }} p
left join {{ ref('stg_patient_address') }} a
    on a.patient_key = p.id
    and a._source = p._source
    and a."index" = 0
