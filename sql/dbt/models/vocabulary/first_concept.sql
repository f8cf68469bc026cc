-- The first concept of each code, for units, routes and answers, of which a row of OMOP has one.
select system, code, source_concept_id, concept_id
from {{ ref('concept_map') }}
where ordinal = 1
