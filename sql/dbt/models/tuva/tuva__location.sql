-- A row for each Location.
with numbers as (
    select
        i._source,
        i.location_key,
        min(i.value) as npi
    from {{ ref('stg_location_identifier') }} i
    where i.system = 'http://hl7.org/fhir/sid/us-npi'
    group by i._source, i.location_key
)

select
    {{ source_key('l._source', 'l.id') }} as location_id,
    coalesce(n.npi, o.npi) as npi,
    l.name as name,
    coalesce(l.type_display, l.type_text, l.type_code, l.physical_type_display, l.physical_type_text, l.physical_type_code) as facility_type,
    coalesce(o.name, p.name) as parent_organization,
    l.address_line as address,
    l.address_city as city,
    l.address_state as state,
    l.address_postal_code as zip_code,
    l.latitude as latitude,
    l.longitude as longitude,
    l._source as data_source
from {{ ref('stg_location') }} l
left join numbers n on n.location_key = l.id and n._source = l._source
left join {{ ref('stg_organization') }} o on o.id = l.managing_organization_key and o._source = l._source
left join {{ ref('stg_location') }} p on p.id = l.part_of_key and p._source = l._source
