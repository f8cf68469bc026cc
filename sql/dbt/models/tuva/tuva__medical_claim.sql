-- A row for each item of ExplanationOfBenefits that were neither cancelled nor entered in error, other than of pharmacies.
-- Diagnoses and procedures of a claim are numbered by their sequence; Tuva has the first 25 of each.
with modifiers as (
    select
        r._source,
        r.explanation_of_benefit_key,
        r.item_index,
        max(case when r."index" = 0 then r.modifier_code end) as modifier_1,
        max(case when r."index" = 1 then r.modifier_code end) as modifier_2,
        max(case when r."index" = 2 then r.modifier_code end) as modifier_3,
        max(case when r."index" = 3 then r.modifier_code end) as modifier_4,
        max(case when r."index" = 4 then r.modifier_code end) as modifier_5
    from {{ ref('stg_explanation_of_benefit_item_modifier') }} r
    group by r._source, r.explanation_of_benefit_key, r.item_index
),

information as (
    select
        r._source,
        r.explanation_of_benefit_key,
        min(case when r.category_code = 'admissionperiod' then r.timing_start_date end) as admission_date,
        max(case when r.category_code = 'admissionperiod' then r.timing_end_date end) as discharge_date,
        max(case when r.category_code = 'pointoforigin' then r.code end) as admit_source,
        max(case when r.category_code = 'admtype' then r.code end) as admit_type,
        max(case when r.category_code = 'discharge-status' then r.code end) as discharge_disposition,
        max(case when r.category_code = 'typeofbill' then r.code end) as bill_type,
        max(case when r.category_code = 'drg' then r.code_system end) as drg_type,
        max(case when r.category_code = 'drg' then r.code end) as drg
    from {{ ref('stg_explanation_of_benefit_supporting_info') }} r
    group by r._source, r.explanation_of_benefit_key
),

teams as (
    select
        r._source,
        r.explanation_of_benefit_key,
        min(w.npi) as rendering_npi
    from {{ ref('stg_explanation_of_benefit_care_team') }} r
    join {{ ref('stg_practitioner') }} w on w.id = r.practitioner_key and w._source = r._source
    where r.role_code in ('rendering', 'performing', 'primary')
    group by r._source, r.explanation_of_benefit_key
),

-- A diagnosis has a code, or refers to a Condition that has one.
numbered_diagnoses as (
    select
        r._source,
        r.explanation_of_benefit_key,
        coalesce(r.diagnosis_code, c.code) as code,
        coalesce(r.diagnosis_system, c.code_system) as system,
        r.on_admission_code,
        row_number() over (partition by r._source, r.explanation_of_benefit_key order by r.sequence nulls last, r."index") as position
    from {{ ref('stg_explanation_of_benefit_diagnosis') }} r
    left join {{ ref('stg_condition') }} c on c.id = r.condition_key and c._source = r._source
),

diagnoses as (
    select
        r._source,
        r.explanation_of_benefit_key,
        max(case when r.position = 1 then coalesce(y.code_type, r.system) end) as code_type,
        max(case when r.position = 1 then r.code end) as code_1,
        max(case when r.position = 2 then r.code end) as code_2,
        max(case when r.position = 3 then r.code end) as code_3,
        max(case when r.position = 4 then r.code end) as code_4,
        max(case when r.position = 5 then r.code end) as code_5,
        max(case when r.position = 6 then r.code end) as code_6,
        max(case when r.position = 7 then r.code end) as code_7,
        max(case when r.position = 8 then r.code end) as code_8,
        max(case when r.position = 9 then r.code end) as code_9,
        max(case when r.position = 10 then r.code end) as code_10,
        max(case when r.position = 11 then r.code end) as code_11,
        max(case when r.position = 12 then r.code end) as code_12,
        max(case when r.position = 13 then r.code end) as code_13,
        max(case when r.position = 14 then r.code end) as code_14,
        max(case when r.position = 15 then r.code end) as code_15,
        max(case when r.position = 16 then r.code end) as code_16,
        max(case when r.position = 17 then r.code end) as code_17,
        max(case when r.position = 18 then r.code end) as code_18,
        max(case when r.position = 19 then r.code end) as code_19,
        max(case when r.position = 20 then r.code end) as code_20,
        max(case when r.position = 21 then r.code end) as code_21,
        max(case when r.position = 22 then r.code end) as code_22,
        max(case when r.position = 23 then r.code end) as code_23,
        max(case when r.position = 24 then r.code end) as code_24,
        max(case when r.position = 25 then r.code end) as code_25,
        max(case when r.position = 1 then r.on_admission_code end) as poa_1,
        max(case when r.position = 2 then r.on_admission_code end) as poa_2,
        max(case when r.position = 3 then r.on_admission_code end) as poa_3,
        max(case when r.position = 4 then r.on_admission_code end) as poa_4,
        max(case when r.position = 5 then r.on_admission_code end) as poa_5,
        max(case when r.position = 6 then r.on_admission_code end) as poa_6,
        max(case when r.position = 7 then r.on_admission_code end) as poa_7,
        max(case when r.position = 8 then r.on_admission_code end) as poa_8,
        max(case when r.position = 9 then r.on_admission_code end) as poa_9,
        max(case when r.position = 10 then r.on_admission_code end) as poa_10,
        max(case when r.position = 11 then r.on_admission_code end) as poa_11,
        max(case when r.position = 12 then r.on_admission_code end) as poa_12,
        max(case when r.position = 13 then r.on_admission_code end) as poa_13,
        max(case when r.position = 14 then r.on_admission_code end) as poa_14,
        max(case when r.position = 15 then r.on_admission_code end) as poa_15,
        max(case when r.position = 16 then r.on_admission_code end) as poa_16,
        max(case when r.position = 17 then r.on_admission_code end) as poa_17,
        max(case when r.position = 18 then r.on_admission_code end) as poa_18,
        max(case when r.position = 19 then r.on_admission_code end) as poa_19,
        max(case when r.position = 20 then r.on_admission_code end) as poa_20,
        max(case when r.position = 21 then r.on_admission_code end) as poa_21,
        max(case when r.position = 22 then r.on_admission_code end) as poa_22,
        max(case when r.position = 23 then r.on_admission_code end) as poa_23,
        max(case when r.position = 24 then r.on_admission_code end) as poa_24,
        max(case when r.position = 25 then r.on_admission_code end) as poa_25
    from numbered_diagnoses r
    left join {{ ref('code_systems') }} y on y.system = r.system
    group by r._source, r.explanation_of_benefit_key
),

numbered_procedures as (
    select
        r._source,
        r.explanation_of_benefit_key,
        coalesce(r.procedure_code, c.code) as code,
        coalesce(r.procedure_system, c.code_system) as system,
        coalesce(r.date_date, c.performed_start_date) as day,
        row_number() over (partition by r._source, r.explanation_of_benefit_key order by r.sequence nulls last, r."index") as position
    from {{ ref('stg_explanation_of_benefit_procedure') }} r
    left join {{ ref('stg_procedure') }} c on c.id = r.procedure_key and c._source = r._source
),

procedures as (
    select
        r._source,
        r.explanation_of_benefit_key,
        max(case when r.position = 1 then coalesce(y.code_type, r.system) end) as code_type,
        max(case when r.position = 1 then r.code end) as code_1,
        max(case when r.position = 2 then r.code end) as code_2,
        max(case when r.position = 3 then r.code end) as code_3,
        max(case when r.position = 4 then r.code end) as code_4,
        max(case when r.position = 5 then r.code end) as code_5,
        max(case when r.position = 6 then r.code end) as code_6,
        max(case when r.position = 7 then r.code end) as code_7,
        max(case when r.position = 8 then r.code end) as code_8,
        max(case when r.position = 9 then r.code end) as code_9,
        max(case when r.position = 10 then r.code end) as code_10,
        max(case when r.position = 11 then r.code end) as code_11,
        max(case when r.position = 12 then r.code end) as code_12,
        max(case when r.position = 13 then r.code end) as code_13,
        max(case when r.position = 14 then r.code end) as code_14,
        max(case when r.position = 15 then r.code end) as code_15,
        max(case when r.position = 16 then r.code end) as code_16,
        max(case when r.position = 17 then r.code end) as code_17,
        max(case when r.position = 18 then r.code end) as code_18,
        max(case when r.position = 19 then r.code end) as code_19,
        max(case when r.position = 20 then r.code end) as code_20,
        max(case when r.position = 21 then r.code end) as code_21,
        max(case when r.position = 22 then r.code end) as code_22,
        max(case when r.position = 23 then r.code end) as code_23,
        max(case when r.position = 24 then r.code end) as code_24,
        max(case when r.position = 25 then r.code end) as code_25,
        max(case when r.position = 1 then r.day end) as date_1,
        max(case when r.position = 2 then r.day end) as date_2,
        max(case when r.position = 3 then r.day end) as date_3,
        max(case when r.position = 4 then r.day end) as date_4,
        max(case when r.position = 5 then r.day end) as date_5,
        max(case when r.position = 6 then r.day end) as date_6,
        max(case when r.position = 7 then r.day end) as date_7,
        max(case when r.position = 8 then r.day end) as date_8,
        max(case when r.position = 9 then r.day end) as date_9,
        max(case when r.position = 10 then r.day end) as date_10,
        max(case when r.position = 11 then r.day end) as date_11,
        max(case when r.position = 12 then r.day end) as date_12,
        max(case when r.position = 13 then r.day end) as date_13,
        max(case when r.position = 14 then r.day end) as date_14,
        max(case when r.position = 15 then r.day end) as date_15,
        max(case when r.position = 16 then r.day end) as date_16,
        max(case when r.position = 17 then r.day end) as date_17,
        max(case when r.position = 18 then r.day end) as date_18,
        max(case when r.position = 19 then r.day end) as date_19,
        max(case when r.position = 20 then r.day end) as date_20,
        max(case when r.position = 21 then r.day end) as date_21,
        max(case when r.position = 22 then r.day end) as date_22,
        max(case when r.position = 23 then r.day end) as date_23,
        max(case when r.position = 24 then r.day end) as date_24,
        max(case when r.position = 25 then r.day end) as date_25
    from numbered_procedures r
    left join {{ ref('code_systems') }} y on y.system = r.system
    group by r._source, r.explanation_of_benefit_key
)

select
    {{ source_key('e._source', 'e.id') }} as claim_id,
    coalesce(i.sequence, i."index" + 1) as claim_line_number,
    case e.type_code when 'institutional' then 'institutional' when 'professional' then 'professional' else 'undetermined' end as claim_type,
    {{ source_key('e._source', 'e.patient_key') }} as person_id,
    coalesce(v.member_id, v.subscriber_id, v.identifier_value) as member_id,
    coalesce(e.insurer_display, o.name, e.coverage_payor_display) as payer,
    coalesce(v.plan_name, v.plan_value, e.coverage_type_text, e.coverage_display) as plan,
    e.billable_period_start_date as claim_start_date,
    e.billable_period_end_date as claim_end_date,
    i.serviced_start_date as claim_line_start_date,
    coalesce(i.serviced_end_date, i.serviced_start_date) as claim_line_end_date,
    s.admission_date as admission_date,
    s.discharge_date as discharge_date,
    s.admit_source as admit_source_code,
    s.admit_type as admit_type_code,
    s.discharge_disposition as discharge_disposition_code,
    i.location_code as place_of_service_code,
    s.bill_type as bill_type_code,
    s.drg_type as drg_code_type,
    s.drg as drg_code,
    i.revenue_code as revenue_center_code,
    i.quantity_value as service_unit_quantity,
    case when y.code_type in ('hcpcs', 'cpt') then i.product_code else i.product_cpt_code end as hcpcs_code,
    m.modifier_1 as hcpcs_modifier_1,
    m.modifier_2 as hcpcs_modifier_2,
    m.modifier_3 as hcpcs_modifier_3,
    m.modifier_4 as hcpcs_modifier_4,
    m.modifier_5 as hcpcs_modifier_5,
    t.rendering_npi as rendering_npi,
    cast(null as text) as rendering_tin,
    coalesce(b.npi, w.npi) as billing_npi,
    cast(null as text) as billing_tin,
    f.npi as facility_npi,
    e.payment_date as paid_date,
    a.paid as paid_amount,
    a.allowed as allowed_amount,
    coalesce(a.charge, i.net_value) as charge_amount,
    a.coinsurance as coinsurance_amount,
    a.copayment as copayment_amount,
    a.deductible as deductible_amount,
    cast(null as numeric) as total_cost_amount,
    d.code_type as diagnosis_code_type,
    d.code_1 as diagnosis_code_1,
    d.code_2 as diagnosis_code_2,
    d.code_3 as diagnosis_code_3,
    d.code_4 as diagnosis_code_4,
    d.code_5 as diagnosis_code_5,
    d.code_6 as diagnosis_code_6,
    d.code_7 as diagnosis_code_7,
    d.code_8 as diagnosis_code_8,
    d.code_9 as diagnosis_code_9,
    d.code_10 as diagnosis_code_10,
    d.code_11 as diagnosis_code_11,
    d.code_12 as diagnosis_code_12,
    d.code_13 as diagnosis_code_13,
    d.code_14 as diagnosis_code_14,
    d.code_15 as diagnosis_code_15,
    d.code_16 as diagnosis_code_16,
    d.code_17 as diagnosis_code_17,
    d.code_18 as diagnosis_code_18,
    d.code_19 as diagnosis_code_19,
    d.code_20 as diagnosis_code_20,
    d.code_21 as diagnosis_code_21,
    d.code_22 as diagnosis_code_22,
    d.code_23 as diagnosis_code_23,
    d.code_24 as diagnosis_code_24,
    d.code_25 as diagnosis_code_25,
    d.poa_1 as diagnosis_poa_1,
    d.poa_2 as diagnosis_poa_2,
    d.poa_3 as diagnosis_poa_3,
    d.poa_4 as diagnosis_poa_4,
    d.poa_5 as diagnosis_poa_5,
    d.poa_6 as diagnosis_poa_6,
    d.poa_7 as diagnosis_poa_7,
    d.poa_8 as diagnosis_poa_8,
    d.poa_9 as diagnosis_poa_9,
    d.poa_10 as diagnosis_poa_10,
    d.poa_11 as diagnosis_poa_11,
    d.poa_12 as diagnosis_poa_12,
    d.poa_13 as diagnosis_poa_13,
    d.poa_14 as diagnosis_poa_14,
    d.poa_15 as diagnosis_poa_15,
    d.poa_16 as diagnosis_poa_16,
    d.poa_17 as diagnosis_poa_17,
    d.poa_18 as diagnosis_poa_18,
    d.poa_19 as diagnosis_poa_19,
    d.poa_20 as diagnosis_poa_20,
    d.poa_21 as diagnosis_poa_21,
    d.poa_22 as diagnosis_poa_22,
    d.poa_23 as diagnosis_poa_23,
    d.poa_24 as diagnosis_poa_24,
    d.poa_25 as diagnosis_poa_25,
    p.code_type as procedure_code_type,
    p.code_1 as procedure_code_1,
    p.code_2 as procedure_code_2,
    p.code_3 as procedure_code_3,
    p.code_4 as procedure_code_4,
    p.code_5 as procedure_code_5,
    p.code_6 as procedure_code_6,
    p.code_7 as procedure_code_7,
    p.code_8 as procedure_code_8,
    p.code_9 as procedure_code_9,
    p.code_10 as procedure_code_10,
    p.code_11 as procedure_code_11,
    p.code_12 as procedure_code_12,
    p.code_13 as procedure_code_13,
    p.code_14 as procedure_code_14,
    p.code_15 as procedure_code_15,
    p.code_16 as procedure_code_16,
    p.code_17 as procedure_code_17,
    p.code_18 as procedure_code_18,
    p.code_19 as procedure_code_19,
    p.code_20 as procedure_code_20,
    p.code_21 as procedure_code_21,
    p.code_22 as procedure_code_22,
    p.code_23 as procedure_code_23,
    p.code_24 as procedure_code_24,
    p.code_25 as procedure_code_25,
    p.date_1 as procedure_date_1,
    p.date_2 as procedure_date_2,
    p.date_3 as procedure_date_3,
    p.date_4 as procedure_date_4,
    p.date_5 as procedure_date_5,
    p.date_6 as procedure_date_6,
    p.date_7 as procedure_date_7,
    p.date_8 as procedure_date_8,
    p.date_9 as procedure_date_9,
    p.date_10 as procedure_date_10,
    p.date_11 as procedure_date_11,
    p.date_12 as procedure_date_12,
    p.date_13 as procedure_date_13,
    p.date_14 as procedure_date_14,
    p.date_15 as procedure_date_15,
    p.date_16 as procedure_date_16,
    p.date_17 as procedure_date_17,
    p.date_18 as procedure_date_18,
    p.date_19 as procedure_date_19,
    p.date_20 as procedure_date_20,
    p.date_21 as procedure_date_21,
    p.date_22 as procedure_date_22,
    p.date_23 as procedure_date_23,
    p.date_24 as procedure_date_24,
    p.date_25 as procedure_date_25,
    cast(null as integer) as in_network_flag,
    cast(null as text) as file_name,
    cast(null as date) as file_date,
    cast(e.loaded_at as timestamp) as ingest_datetime,
    e._source as data_source
from {{ ref('stg_explanation_of_benefit') }} e
join {{ ref('stg_explanation_of_benefit_item') }} i on i.explanation_of_benefit_key = e.id and i._source = e._source
left join {{ ref('claim_amounts') }} a
    on a.explanation_of_benefit_key = e.id and a._source = e._source and a.item_index = i."index"
left join modifiers m
    on m.explanation_of_benefit_key = e.id and m._source = e._source and m.item_index = i."index"
left join information s on s.explanation_of_benefit_key = e.id and s._source = e._source
left join teams t on t.explanation_of_benefit_key = e.id and t._source = e._source
left join diagnoses d on d.explanation_of_benefit_key = e.id and d._source = e._source
left join procedures p on p.explanation_of_benefit_key = e.id and p._source = e._source
left join {{ ref('code_systems') }} y on y.system = i.product_system
left join {{ ref('stg_coverage') }} v on v.id = e.coverage_key and v._source = e._source
left join {{ ref('stg_organization') }} o on o.id = e.insurer_key and o._source = e._source
left join {{ ref('stg_organization') }} b on b.id = e.provider_organization_key and b._source = e._source
left join {{ ref('stg_practitioner') }} w on w.id = e.provider_practitioner_key and w._source = e._source
left join {{ ref('tuva__location') }} f on f.location_id = {{ source_key('e._source', 'e.facility_key') }}
where coalesce(e.status, '') not in ('cancelled', 'draft', 'entered-in-error')
    and coalesce(e.use, 'claim') = 'claim'
    and coalesce(e.type_code, '') not in ('pharmacy', 'PDE')
