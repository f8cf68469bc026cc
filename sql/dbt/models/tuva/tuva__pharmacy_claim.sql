-- A row for each item of the ExplanationOfBenefits of pharmacies: no drafts, none cancelled or entered in error.
with information as (
    select
        r._source,
        r.explanation_of_benefit_key,
        max(case when r.category_code = 'dayssupply' then r.value_quantity_value end) as days,
        max(case when r.category_code = 'refillnum' then r.value_quantity_value end) as refill
    from {{ ref('stg_explanation_of_benefit_supporting_info') }} r
    group by r._source, r.explanation_of_benefit_key
),

-- CARIN has the role prescribing; in Blue Button the prescriber is the primary member of the team.
teams as (
    select
        r._source,
        r.explanation_of_benefit_key,
        min(case when r.role_code = 'prescribing' then w.npi end) as prescribing_npi,
        min(case when r.role_code = 'primary' then w.npi end) as primary_npi
    from {{ ref('stg_explanation_of_benefit_care_team') }} r
    join {{ ref('stg_practitioner') }} w on w.id = r.practitioner_key and w._source = r._source
    group by r._source, r.explanation_of_benefit_key
)

select
    {{ source_key('e._source', 'e.id') }} as claim_id,
    coalesce(i.sequence, i."index" + 1) as claim_line_number,
    {{ source_key('e._source', 'e.patient_key') }} as person_id,
    coalesce(v.member_id, v.subscriber_id, v.identifier_value) as member_id,
    coalesce(e.insurer_display, o.name, e.coverage_payor_display) as payer,
    coalesce(v.plan_name, v.plan_value, e.coverage_type_text, e.coverage_display) as plan,
    coalesce(t.prescribing_npi, q.npi, t.primary_npi) as prescribing_provider_npi,
    coalesce(b.npi, w.npi) as dispensing_provider_npi,
    coalesce(i.serviced_start_date, e.billable_period_start_date) as dispensing_date,
    case when y.code_type = 'ndc' then {{ ndc_digits('i.product_code') }} end as ndc_code,
    i.quantity_value as quantity,
    cast(s.days as integer) as days_supply,
    cast(s.refill as integer) as refills,
    e.payment_date as paid_date,
    a.paid as paid_amount,
    a.allowed as allowed_amount,
    coalesce(a.charge, i.net_value) as charge_amount,
    a.coinsurance as coinsurance_amount,
    a.copayment as copayment_amount,
    a.deductible as deductible_amount,
    cast(null as integer) as in_network_flag,
    cast(null as text) as file_name,
    cast(null as date) as file_date,
    cast(e.loaded_at as timestamp) as ingest_datetime,
    e._source as data_source
from {{ ref('stg_explanation_of_benefit') }} e
join {{ ref('stg_explanation_of_benefit_item') }} i on i.explanation_of_benefit_key = e.id and i._source = e._source
left join {{ ref('claim_amounts') }} a
    on a.explanation_of_benefit_key = e.id and a._source = e._source and a.item_index = i."index"
left join information s on s.explanation_of_benefit_key = e.id and s._source = e._source
left join teams t on t.explanation_of_benefit_key = e.id and t._source = e._source
left join {{ ref('code_systems') }} y on y.system = i.product_system
left join {{ ref('stg_coverage') }} v on v.id = e.coverage_key and v._source = e._source
left join {{ ref('stg_organization') }} o on o.id = e.insurer_key and o._source = e._source
left join {{ ref('stg_organization') }} b on b.id = e.provider_organization_key and b._source = e._source
left join {{ ref('stg_practitioner') }} w on w.id = e.provider_practitioner_key and w._source = e._source
left join {{ ref('stg_medication_request') }} m on m.id = e.prescription_key and m._source = e._source
left join {{ ref('stg_practitioner') }} q on q.id = m.requester_key and q._source = m._source
where coalesce(e.status, '') not in ('cancelled', 'draft', 'entered-in-error')
    and coalesce(e.use, 'claim') = 'claim'
    and e.type_code in ('pharmacy', 'PDE')
