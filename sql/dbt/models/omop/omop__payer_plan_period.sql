-- A row for each Coverage that was neither cancelled nor entered in error.
select
    {{ stable_id('Coverage', 'c._source', 'c.id') }} as payer_plan_period_id,
    {{ stable_id('Patient', 'c._source', 'c.patient_key') }} as person_id,
    c.period_start_date as payer_plan_period_start_date,
    coalesce(c.period_end_date, greatest(c.period_start_date, current_date)) as payer_plan_period_end_date,
    coalesce(m.concept_id, 0) as payer_concept_id,
    coalesce(o.name, c.payor_display) as payer_source_value,
    coalesce(m.source_concept_id, 0) as payer_source_concept_id,
    0 as plan_concept_id,
    coalesce(c.plan_name, c.plan_value) as plan_source_value,
    0 as plan_source_concept_id,
    0 as sponsor_concept_id,
    coalesce(h.name, c.group_name, c.group_value) as sponsor_source_value,
    0 as sponsor_source_concept_id,
    coalesce(c.subscriber_id, c.subscriber_key) as family_source_value,
    cast(null as integer) as stop_reason_concept_id,
    cast(null as text) as stop_reason_source_value,
    cast(null as integer) as stop_reason_source_concept_id
from {{ ref('stg_coverage') }} c
left join {{ ref('stg_organization') }} o on o.id = c.payor_key and o._source = c._source
left join {{ ref('stg_organization') }} h on h.id = c.policy_holder_organization_key and h._source = c._source
left join {{ ref('first_concept') }} m on m.system = c.type_system and m.code = c.type_code
where coalesce(c.status, '') not in ('cancelled', 'draft', 'entered-in-error')
