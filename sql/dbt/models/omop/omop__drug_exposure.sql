-- A row for each order, dispense, administration and statement of a medication and for each immunization, that was neither
-- cancelled nor entered in error, and each standard concept of the drug.
with exposures as (
    select
        'MedicationRequest' as kind,
        32838 as type_concept_id,
        r._source,
        r.id,
        r.patient_key,
        r.encounter_key,
        r.requester_key as practitioner_key,
        coalesce(r.medication_system, d.code_system) as system,
        coalesce(r.medication_code, d.code) as code,
        coalesce(r.medication_display, r.medication_text, d.code_display, d.code_text) as text,
        r.authored_on_date as start_date,
        {{ local_time('r.authored_on') }} as start_time,
        cast(null as date) as end_date,
        cast(null as timestamp) as end_time,
        coalesce(r.status_reason_code, r.status_reason_text) as stop_reason,
        r.number_of_repeats_allowed as refills,
        r.dispense_quantity_value as quantity,
        cast(case when r.expected_supply_duration_code = 'd' then r.expected_supply_duration_value end as integer) as days,
        r.dosage_text as sig,
        g.route_system,
        g.route_code,
        coalesce(g.route_display, g.route_text) as route,
        cast(null as text) as lot_number,
        g.dose_quantity_unit as dose_unit
    from {{ ref('stg_medication_request') }} r
    left join {{ ref('stg_medication') }} d on d.id = r.medication_key and d._source = r._source
    left join {{ ref('stg_medication_request_dosage') }} g
        on g.medication_request_key = r.id and g._source = r._source and g."index" = 0
    where coalesce(r.status, '') not in ('draft', 'cancelled', 'entered-in-error')
        and coalesce(r.intent, '') not in ('proposal', 'plan')
        and not coalesce(r.do_not_perform, false)

    union all

    select
        'MedicationDispense',
        32825,
        r._source,
        r.id,
        r.patient_key,
        r.encounter_key,
        r.practitioner_key,
        coalesce(r.medication_system, d.code_system),
        coalesce(r.medication_code, d.code),
        coalesce(r.medication_display, r.medication_text, d.code_display, d.code_text),
        coalesce(r.when_handed_over_date, r.when_prepared_date),
        coalesce({{ local_time('r.when_handed_over') }}, {{ local_time('r.when_prepared') }}),
        cast(null as date),
        cast(null as timestamp),
        coalesce(r.status_reason_code, r.status_reason_text),
        cast(null as integer),
        r.quantity_value,
        cast(case when r.days_supply_code = 'd' or lower(r.days_supply_unit) in ('day', 'days', 'd') then r.days_supply_value end as integer),
        r.dosage_text,
        g.route_system,
        g.route_code,
        coalesce(g.route_display, g.route_text),
        cast(null as text),
        g.dose_quantity_unit
    from {{ ref('stg_medication_dispense') }} r
    left join {{ ref('stg_medication') }} d on d.id = r.medication_key and d._source = r._source
    left join {{ ref('stg_medication_dispense_dosage') }} g
        on g.medication_dispense_key = r.id and g._source = r._source and g."index" = 0
    where coalesce(r.status, '') not in ('preparation', 'cancelled', 'declined', 'entered-in-error')

    union all

    select
        'MedicationAdministration',
        32818,
        r._source,
        r.id,
        r.patient_key,
        r.encounter_key,
        r.practitioner_key,
        coalesce(r.medication_system, d.code_system),
        coalesce(r.medication_code, d.code),
        coalesce(r.medication_display, r.medication_text, d.code_display, d.code_text),
        r.effective_start_date,
        {{ local_time('r.effective_start') }},
        r.effective_end_date,
        {{ local_time('r.effective_end') }},
        coalesce(r.status_reason_code, r.status_reason_text),
        cast(null as integer),
        r.dose_value,
        cast(null as integer),
        r.dosage_text,
        r.route_system,
        r.route_code,
        coalesce(r.route_display, r.route_text),
        cast(null as text),
        r.dose_unit
    from {{ ref('stg_medication_administration') }} r
    left join {{ ref('stg_medication') }} d on d.id = r.medication_key and d._source = r._source
    where coalesce(r.status, '') not in ('not-done', 'entered-in-error')

    union all

    select
        'MedicationStatement',
        32865,
        r._source,
        r.id,
        r.patient_key,
        r.encounter_key,
        r.informant_practitioner_key,
        coalesce(r.medication_system, d.code_system),
        coalesce(r.medication_code, d.code),
        coalesce(r.medication_display, r.medication_text, d.code_display, d.code_text),
        coalesce(r.effective_start_date, r.date_asserted_date),
        coalesce({{ local_time('r.effective_start') }}, {{ local_time('r.date_asserted') }}),
        r.effective_end_date,
        {{ local_time('r.effective_end') }},
        coalesce(r.status_reason_code, r.status_reason_text),
        cast(null as integer),
        null,
        cast(null as integer),
        r.dosage_text,
        g.route_system,
        g.route_code,
        coalesce(g.route_display, g.route_text),
        cast(null as text),
        g.dose_quantity_unit
    from {{ ref('stg_medication_statement') }} r
    left join {{ ref('stg_medication') }} d on d.id = r.medication_key and d._source = r._source
    left join {{ ref('stg_medication_statement_dosage') }} g
        on g.medication_statement_key = r.id and g._source = r._source and g."index" = 0
    where coalesce(r.status, '') not in ('intended', 'not-taken', 'entered-in-error')

    union all

    select
        'Immunization',
        32818,
        r._source,
        r.id,
        r.patient_key,
        r.encounter_key,
        r.practitioner_key,
        r.vaccine_system,
        r.vaccine_code,
        coalesce(r.vaccine_display, r.vaccine_text),
        r.occurrence_date_time_date,
        {{ local_time('r.occurrence_date_time') }},
        cast(null as date),
        cast(null as timestamp),
        cast(null as text),
        cast(null as integer),
        r.dose_quantity_value,
        cast(null as integer),
        cast(null as text),
        r.route_system,
        r.route_code,
        coalesce(r.route_display, r.route_text),
        r.lot_number,
        r.dose_quantity_unit
    from {{ ref('stg_immunization') }} r
    where coalesce(r.status, '') not in ('not-done', 'entered-in-error')
)

select
    {{ stable_id('drug', 'x._source', "x.kind || '/' || x.id || '|' || coalesce(m.ordinal, 1)") }} as drug_exposure_id,
    {{ stable_id('Patient', 'x._source', 'x.patient_key') }} as person_id,
    coalesce(m.concept_id, 0) as drug_concept_id,
    x.start_date as drug_exposure_start_date,
    x.start_time as drug_exposure_start_datetime,
    coalesce(x.end_date, x.start_date + greatest(x.days - 1, 0), x.start_date) as drug_exposure_end_date,
    x.end_time as drug_exposure_end_datetime,
    x.end_date as verbatim_end_date,
    x.type_concept_id as drug_type_concept_id,
    x.stop_reason as stop_reason,
    x.refills as refills,
    x.quantity as quantity,
    x.days as days_supply,
    x.sig as sig,
    coalesce(w.concept_id, 0) as route_concept_id,
    x.lot_number as lot_number,
    {{ stable_id('Practitioner', 'x._source', 'x.practitioner_key') }} as provider_id,
    {{ stable_id('Encounter', 'x._source', 'x.encounter_key') }} as visit_occurrence_id,
    cast(null as bigint) as visit_detail_id,
    coalesce(x.code, x.text) as drug_source_value,
    coalesce(m.source_concept_id, 0) as drug_source_concept_id,
    coalesce(x.route_code, x.route) as route_source_value,
    x.dose_unit as dose_unit_source_value
from exposures x
left join {{ ref('concept_map') }} m on m.system = x.system and m.code = x.code
left join {{ ref('first_concept') }} w on w.system = x.route_system and w.code = x.route_code
