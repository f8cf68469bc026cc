-- A row for each Practitioner, with the specialty and organization of the role that began last.
select
    {{ stable_id('Practitioner', 'p._source', 'p.id') }} as provider_id,
    nullif(trim(coalesce(p.given, '') || ' ' || coalesce(p.family, '')), '') as provider_name,
    p.npi as npi,
    cast(null as text) as dea,
    coalesce(m.concept_id, 0) as specialty_concept_id,
    {{ stable_id('Organization', 'r._source', 'r.organization_key') }} as care_site_id,
    cast(extract(year from p.birth_date) as integer) as year_of_birth,
    {{ gender_concept('p.gender') }} as gender_concept_id,
    p.id as provider_source_value,
    coalesce(r.specialty_code, r.specialty_text) as specialty_source_value,
    coalesce(m.source_concept_id, 0) as specialty_source_concept_id,
    p.gender as gender_source_value,
    0 as gender_source_concept_id
from {{ ref('stg_practitioner') }} p
left join {{ ref('first_role') }} r on r.practitioner_key = p.id and r._source = p._source
left join {{ ref('first_concept') }} m on m.system = r.specialty_system and m.code = r.specialty_code
