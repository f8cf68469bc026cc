-- A row for each Practitioner, with the specialty and organization of the role that began last.
select
    {{ source_key('p._source', 'p.id') }} as practitioner_id,
    p.npi as npi,
    p.given as first_name,
    p.family as last_name,
    o.name as practice_affiliation,
    coalesce(r.specialty_display, r.specialty_text, r.specialty_code) as specialty,
    cast(null as text) as sub_specialty,
    p._source as data_source
from {{ ref('stg_practitioner') }} p
left join {{ ref('first_role') }} r on r.practitioner_key = p.id and r._source = p._source
left join {{ ref('stg_organization') }} o on o.id = r.organization_key and o._source = p._source
