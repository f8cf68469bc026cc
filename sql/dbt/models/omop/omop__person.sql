-- A row for each Patient.
select
    {{ stable_id('Patient', 'p._source', 'p.id') }} as person_id,
    {{ gender_concept('p.gender') }} as gender_concept_id,
    cast(extract(year from p.birth_date) as integer) as year_of_birth,
    case when p.birth_date_precision in ('month', 'day') then cast(extract(month from p.birth_date) as integer) end as month_of_birth,
    case when p.birth_date_precision = 'day' then cast(extract(day from p.birth_date) as integer) end as day_of_birth,
    case when p.birth_date_precision = 'day' then cast(p.birth_date as timestamp) end as birth_datetime,
    case p.race_code when '2106-3' then 8527 when '2054-5' then 8516 when '2028-9' then 8515 when '1002-5' then 8657 when '2076-8' then 8557 else 0 end as race_concept_id,
    case p.ethnicity_code when '2135-2' then 38003563 when '2186-5' then 38003564 else 0 end as ethnicity_concept_id,
    case when coalesce(p.address_line, p.address_city, p.address_postal_code, p.address_country) is not null then {{ stable_id('Patient address', 'p._source', 'p.id') }} end as location_id,
    {{ stable_id('Practitioner', 'p._source', 'p.general_practitioner_key') }} as provider_id,
    {{ stable_id('Organization', 'p._source', 'p.managing_organization_key') }} as care_site_id,
    p.id as person_source_value,
    p.gender as gender_source_value,
    0 as gender_source_concept_id,
    coalesce(p.race_code, p.race_text) as race_source_value,
    0 as race_source_concept_id,
    coalesce(p.ethnicity_code, p.ethnicity_text) as ethnicity_source_value,
    0 as ethnicity_source_concept_id
from {{ ref('stg_patient') }} p
