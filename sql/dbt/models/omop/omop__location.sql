-- A row for the address of each Patient and Organization, and for each Location.
with addresses as (
    select
        {{ stable_id('Patient address', 'p._source', 'p.id') }} as location_id,
        p.address_line as line,
        p.address_city as city,
        p.address_state as state,
        p.address_postal_code as postal_code,
        p.address_district as district,
        'Patient/' || p.id as reference,
        p.address_country as country,
        {{ number_or_null('a.latitude') }} as latitude,
        {{ number_or_null('a.longitude') }} as longitude
    from {{ ref('stg_patient') }} p
    left join {{ ref('stg_patient_address') }} a
        on a.patient_key = p.id
        and a._source = p._source
        and a."index" = 0
    where coalesce(p.address_line, p.address_city, p.address_postal_code, p.address_country) is not null

    union all

    select
        {{ stable_id('Organization address', 'o._source', 'o.id') }},
        o.address_line,
        o.address_city,
        o.address_state,
        o.address_postal_code,
        cast(null as text),
        'Organization/' || o.id,
        o.address_country,
        null,
        null
    from {{ ref('stg_organization') }} o
    where coalesce(o.address_line, o.address_city, o.address_postal_code, o.address_country) is not null

    union all

    select
        {{ stable_id('Location', 'l._source', 'l.id') }},
        l.address_line,
        l.address_city,
        l.address_state,
        l.address_postal_code,
        cast(null as text),
        'Location/' || l.id,
        l.address_country,
        l.latitude,
        l.longitude
    from {{ ref('stg_location') }} l
)

select
    a.location_id as location_id,
    a.line as address_1,
    cast(null as text) as address_2,
    a.city as city,
    a.state as state,
    a.postal_code as zip,
    a.district as county,
    a.reference as location_source_value,
    case when a.country in ('US', 'USA') then 42046186 else 0 end as country_concept_id,
    a.country as country_source_value,
    a.latitude as latitude,
    a.longitude as longitude
from addresses a
