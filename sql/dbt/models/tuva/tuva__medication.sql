-- A row for each order and each dispense of a medication that was neither cancelled nor entered in error.
with medications as (
    select
        'MedicationRequest/' || r.id as id,
        r._source,
        r.loaded_at,
        r.patient_key,
        r.encounter_key,
        cast(null as date) as dispensing_date,
        r.authored_on_date as prescribing_date,
        coalesce(r.medication_system, d.code_system) as system,
        coalesce(r.medication_code, d.code) as code,
        coalesce(r.medication_display, r.medication_text, d.code_display, d.code_text) as text,
        coalesce(r.ndc_code, d.ndc_code) as ndc_code,
        coalesce(r.rxnorm_code, d.rxnorm_code) as rxnorm_code,
        coalesce(g.route_display, g.route_text, g.route_code) as route,
        d.amount_numerator_value,
        d.amount_numerator_unit,
        r.dispense_quantity_value as quantity,
        r.dispense_quantity_unit as quantity_unit,
        cast(case when r.expected_supply_duration_code = 'd' then r.expected_supply_duration_value end as integer) as days,
        r.requester_key as practitioner_key
    from {{ ref('stg_medication_request') }} r
    left join {{ ref('stg_medication') }} d on d.id = r.medication_key and d._source = r._source
    left join {{ ref('stg_medication_request_dosage') }} g
        on g.medication_request_key = r.id and g._source = r._source and g."index" = 0
    where coalesce(r.status, '') not in ('draft', 'cancelled', 'entered-in-error')
        and coalesce(r.intent, '') not in ('proposal', 'plan')
        and not coalesce(r.do_not_perform, false)

    union all

    select
        'MedicationDispense/' || r.id,
        r._source,
        r.loaded_at,
        r.patient_key,
        r.encounter_key,
        coalesce(r.when_handed_over_date, r.when_prepared_date),
        cast(null as date),
        coalesce(r.medication_system, d.code_system),
        coalesce(r.medication_code, d.code),
        coalesce(r.medication_display, r.medication_text, d.code_display, d.code_text),
        coalesce(r.ndc_code, d.ndc_code),
        coalesce(r.rxnorm_code, d.rxnorm_code),
        coalesce(g.route_display, g.route_text, g.route_code),
        d.amount_numerator_value,
        d.amount_numerator_unit,
        r.quantity_value,
        r.quantity_unit,
        cast(case when r.days_supply_code = 'd' or lower(r.days_supply_unit) in ('day', 'days', 'd') then r.days_supply_value end as integer),
        r.practitioner_key
    from {{ ref('stg_medication_dispense') }} r
    left join {{ ref('stg_medication') }} d on d.id = r.medication_key and d._source = r._source
    left join {{ ref('stg_medication_dispense_dosage') }} g
        on g.medication_dispense_key = r.id and g._source = r._source and g."index" = 0
    where coalesce(r.status, '') not in ('preparation', 'cancelled', 'declined', 'entered-in-error')
)

select
    {{ source_key('m._source', 'm.id') }} as medication_id,
    {{ source_key('m._source', 'm.patient_key') }} as person_id,
    {{ source_key('m._source', 'm.patient_key') }} as patient_id,
    {{ source_key('m._source', 'm.encounter_key') }} as encounter_id,
    m.dispensing_date as dispensing_date,
    m.prescribing_date as prescribing_date,
    coalesce(s.code_type, m.system) as source_code_type,
    m.code as source_code,
    m.text as source_description,
    m.ndc_code as ndc_code,
    m.rxnorm_code as rxnorm_code,
    cast(null as text) as atc_code,
    m.route as route,
    {{ quantity_text('m.amount_numerator_value', 'm.amount_numerator_unit') }} as strength,
    m.quantity as quantity,
    m.quantity_unit as quantity_unit,
    m.days as days_supply,
    {{ source_key('m._source', 'm.practitioner_key') }} as practitioner_id,
    cast(m.loaded_at as timestamp) as ingest_datetime,
    m._source as data_source
from medications m
left join {{ ref('code_systems') }} s on s.system = m.system
