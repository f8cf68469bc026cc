-- A row for each Organization.
select
    {{ stable_id('Organization', 'o._source', 'o.id') }} as care_site_id,
    o.name as care_site_name,
    coalesce(m.concept_id, 0) as place_of_service_concept_id,
    case when coalesce(o.address_line, o.address_city, o.address_postal_code, o.address_country) is not null then {{ stable_id('Organization address', 'o._source', 'o.id') }} end as location_id,
    o.id as care_site_source_value,
    coalesce(o.type_code, o.type_text) as place_of_service_source_value
from {{ ref('stg_organization') }} o
left join {{ ref('first_concept') }} m on m.system = o.type_system and m.code = o.type_code
