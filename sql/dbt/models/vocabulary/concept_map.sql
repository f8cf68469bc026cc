-- The concepts of codes, from the vocabulary of the variable omop_vocabulary; without it, no rows.
-- A code that maps to several standard concepts has a row for each, numbered by ordinal.
{% set vocabulary = var('omop_vocabulary') %}
{% if vocabulary %}
select
    s.system,
    c.concept_code as code,
    c.concept_id as source_concept_id,
    coalesce(r.concept_id_2, case when c.standard_concept = 'S' then c.concept_id end, 0) as concept_id,
    row_number() over (partition by s.system, c.concept_code order by c.concept_id, r.concept_id_2) as ordinal
from {{ vocabulary }}.concept c
join {{ ref('code_systems') }} s on s.vocabulary_id = c.vocabulary_id
left join {{ vocabulary }}.concept_relationship r
    on r.concept_id_1 = c.concept_id
    and r.relationship_id = 'Maps to'
    and r.invalid_reason is null
{% else %}
select
    cast(null as text) as system,
    cast(null as text) as code,
    cast(null as integer) as source_concept_id,
    cast(null as integer) as concept_id,
    cast(null as bigint) as ordinal
where false
{% endif %}
