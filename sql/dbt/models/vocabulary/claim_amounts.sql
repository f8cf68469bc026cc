-- The amounts of each item of ExplanationOfBenefits. CARIN has codes such as benefit, Blue Button URLs that end with its
-- variable. Some payers state a payment both as the benefit and by whom they paid: the first kind that an item has counts.
with adjudications as (
    select
        r._source,
        r.explanation_of_benefit_key,
        r.item_index,
        replace(r.category_code, 'https://bluebutton.cms.gov/resources/variables/', '') as kind,
        r.amount_value as amount,
        r.amount_currency as currency
    from {{ ref('stg_explanation_of_benefit_item_adjudication') }} r
),

sums as (
    select
        j._source,
        j.explanation_of_benefit_key,
        j.item_index,
        max(j.currency) as currency,
        sum(case when j.kind in ('submitted', 'line_sbmtd_chrg_amt') then j.amount end) as charge,
        coalesce(
            sum(case when j.kind = 'eligible' then j.amount end),
            sum(case when j.kind = 'line_alowd_chrg_amt' then j.amount end),
            sum(case when j.kind = 'drugcost' then j.amount end),
            sum(case when j.kind = 'tot_rx_cst_amt' then j.amount end)
        ) as allowed,
        coalesce(
            sum(case when j.kind = 'benefit' then j.amount end),
            sum(case when j.kind in ('paidtoprovider', 'paidtopatient') then j.amount end),
            sum(case when j.kind = 'line_nch_pmt_amt' then j.amount end),
            sum(case when j.kind in ('line_prvdr_pmt_amt', 'line_bene_pmt_amt') then j.amount end),
            sum(case when j.kind in ('cvrd_d_plan_pd_amt', 'ncvrd_plan_pd_amt') then j.amount end)
        ) as paid,
        sum(case when j.kind in ('priorpayerpaid', 'line_bene_prmry_pyr_pd_amt', 'othr_troop_amt', 'plro_amt') then j.amount end) as paid_by_primary,
        sum(case when j.kind in ('paidbypatient', 'ptnt_pay_amt') then j.amount end) as patient_payment,
        sum(case when j.kind in ('coinsurance', 'line_coinsrnc_amt') then j.amount end) as coinsurance,
        sum(case when j.kind = 'copay' then j.amount end) as copayment,
        sum(case when j.kind in ('deductible', 'line_bene_ptb_ddctbl_amt') then j.amount end) as deductible
    from adjudications j
    group by j._source, j.explanation_of_benefit_key, j.item_index
)

select
    s._source,
    s.explanation_of_benefit_key,
    s.item_index,
    s.currency,
    s.charge,
    s.allowed,
    s.paid,
    s.paid_by_primary,
    s.coinsurance,
    s.copayment,
    s.deductible,
    coalesce(
        s.patient_payment,
        case
            when coalesce(s.copayment, s.coinsurance, s.deductible) is not null
                then coalesce(s.copayment, 0) + coalesce(s.coinsurance, 0) + coalesce(s.deductible, 0)
        end
    ) as paid_by_patient
from sums s
