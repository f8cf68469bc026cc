-- A row for each item of ExplanationOfBenefits that were neither cancelled nor entered in error, if its event has a row: the
-- prescription of a pharmacy's claim, the procedure of the item, or else its visit. Of an event with several standard
-- concepts, the first row has the cost.
with procedures as (
    select
        r._source,
        r.explanation_of_benefit_key,
        r.sequence,
        min(r.procedure_key) as procedure_key
    from {{ ref('stg_explanation_of_benefit_procedure') }} r
    group by r._source, r.explanation_of_benefit_key, r.sequence
),

drgs as (
    select
        r._source,
        r.explanation_of_benefit_key,
        max(r.code) as code
    from {{ ref('stg_explanation_of_benefit_supporting_info') }} r
    where r.category_code = 'drg'
    group by r._source, r.explanation_of_benefit_key
),

items as (
    select
        e._source,
        e.id,
        e.coverage_key,
        i."index" as item_index,
        i.net_value,
        i.revenue_system,
        i.revenue_code,
        coalesce(i.net_currency, e.total_currency) as currency,
        case when e.type_code in ('pharmacy', 'PDE') then {{ stable_id('drug', 'e._source', "'MedicationRequest/' || e.prescription_key || '|1'") }} end as drug_id,
        {{ stable_id('Procedure', 'e._source', "p.procedure_key || '|1'") }} as procedure_id,
        {{ stable_id('Encounter', 'e._source', 'coalesce(i.encounter_key, e.encounter_key)') }} as visit_id
    from {{ ref('stg_explanation_of_benefit') }} e
    join {{ ref('stg_explanation_of_benefit_item') }} i on i.explanation_of_benefit_key = e.id and i._source = e._source
    left join procedures p
        on p.explanation_of_benefit_key = e.id and p._source = e._source and p.sequence = i.procedure_sequence
    where coalesce(e.status, '') not in ('cancelled', 'draft', 'entered-in-error')
        and coalesce(e.use, 'claim') = 'claim'
)

select
    {{ stable_id('cost', 'i._source', "i.id || '|' || i.item_index") }} as cost_id,
    coalesce(d.drug_exposure_id, p.procedure_occurrence_id, v.visit_occurrence_id) as cost_event_id,
    case when d.drug_exposure_id is not null then 'Drug' when p.procedure_occurrence_id is not null then 'Procedure' else 'Visit' end as cost_domain_id,
    32810 as cost_type_concept_id,
    case when coalesce(a.currency, i.currency) is not null then coalesce(c.concept_id, case coalesce(a.currency, i.currency) when 'USD' then 44818668 else 0 end) end as currency_concept_id,
    coalesce(a.charge, i.net_value) as total_charge,
    cast(null as numeric) as total_cost,
    case when coalesce(a.paid, a.paid_by_patient, a.paid_by_primary) is not null then coalesce(a.paid, 0) + coalesce(a.paid_by_patient, 0) + coalesce(a.paid_by_primary, 0) end as total_paid,
    a.paid as paid_by_payer,
    a.paid_by_patient as paid_by_patient,
    a.copayment as paid_patient_copay,
    a.coinsurance as paid_patient_coinsurance,
    a.deductible as paid_patient_deductible,
    a.paid_by_primary as paid_by_primary,
    cast(null as numeric) as paid_ingredient_cost,
    cast(null as numeric) as paid_dispensing_fee,
    {{ stable_id('Coverage', 'i._source', 'i.coverage_key') }} as payer_plan_period_id,
    a.allowed as amount_allowed,
    case when i.revenue_code is not null then coalesce(r.concept_id, 0) end as revenue_code_concept_id,
    i.revenue_code as revenue_code_source_value,
    case when g.code is not null then 0 end as drg_concept_id,
    g.code as drg_source_value
from items i
left join {{ ref('claim_amounts') }} a
    on a.explanation_of_benefit_key = i.id and a._source = i._source and a.item_index = i.item_index
left join drgs g on g.explanation_of_benefit_key = i.id and g._source = i._source
left join {{ ref('omop__drug_exposure') }} d on d.drug_exposure_id = i.drug_id
left join {{ ref('omop__procedure_occurrence') }} p on p.procedure_occurrence_id = i.procedure_id
left join {{ ref('omop__visit_occurrence') }} v on v.visit_occurrence_id = i.visit_id
left join {{ ref('first_concept') }} c on c.system = 'urn:iso:std:iso:4217' and c.code = coalesce(a.currency, i.currency)
left join {{ ref('first_concept') }} r on r.system = i.revenue_system and r.code = i.revenue_code
where coalesce(d.drug_exposure_id, p.procedure_occurrence_id, v.visit_occurrence_id) is not null
