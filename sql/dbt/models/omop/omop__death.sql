-- A row for each Patient with a time of death. A death without a time has no row, because death_date is required.
select
    {{ stable_id('Patient', 'p._source', 'p.id') }} as person_id,
    p.deceased_date_time_date as death_date,
    {{ local_time('p.deceased_date_time') }} as death_datetime,
    32817 as death_type_concept_id,
    cast(null as integer) as cause_concept_id,
    cast(null as text) as cause_source_value,
    cast(null as integer) as cause_source_concept_id
from {{ ref('stg_patient') }} p
where p.deceased_date_time_date is not null
