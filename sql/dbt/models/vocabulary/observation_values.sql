-- The values of Observations: a row for each Observation and for each of its components, without those that were entered
-- in error or cancelled. An Observation that has components and no value of its own has no row.
with categories as (
    select
        c._source,
        c.observation_key,
        max(case when c.category_code in ('laboratory', 'vital-signs') then 1 else 0 end) = 1 as is_measurement,
        max(case when c.category_code = 'laboratory' then 1 else 0 end) = 1 as is_laboratory,
        min(c.category_code) as category
    from {{ ref('stg_observation_category') }} c
    group by c._source, c.observation_key
),

parents as (
    select distinct
        c._source,
        c.observation_key
    from {{ ref('stg_observation_component') }} c
),

components as (
    select
        o._source,
        o.id || '#' || c."index" as id,
        o.id as observation_id,
        o.id as panel_id,
        o.status,
        o.patient_key,
        o.encounter_key,
        o.practitioner_key,
        o.service_request_key,
        o.specimen_key,
        o.loaded_at,
        o.effective_start,
        o.effective_start_date,
        o.effective_start_offset,
        o.issued,
        o.issued_date,
        o.issued_offset,
        o.code_system as panel_system,
        o.code as panel_code,
        coalesce(o.code_display, o.code_text) as panel_text,
        c.code_system,
        c.code,
        coalesce(c.code_display, c.code_text) as code_text,
        c.value_quantity_value,
        c.value_quantity_comparator,
        c.value_quantity_unit,
        c.value_quantity_system,
        c.value_quantity_code,
        c.value_concept_system,
        c.value_concept_code,
        coalesce(c.value_concept_display, c.value_concept_text) as value_concept_text,
        c.value_string,
        c.value_boolean,
        c.value_integer,
        c.value_date_time_date,
        c.interpretation_code,
        o.body_site_code,
        cast(null as numeric(38, 18)) as range_low,
        cast(null as numeric(38, 18)) as range_high
    from {{ ref('stg_observation') }} o
    join {{ ref('stg_observation_component') }} c on c.observation_key = o.id and c._source = o._source
),

single as (
    select
        o._source,
        o.id,
        o.id as observation_id,
        cast(null as text) as panel_id,
        o.status,
        o.patient_key,
        o.encounter_key,
        o.practitioner_key,
        o.service_request_key,
        o.specimen_key,
        o.loaded_at,
        o.effective_start,
        o.effective_start_date,
        o.effective_start_offset,
        o.issued,
        o.issued_date,
        o.issued_offset,
        cast(null as text) as panel_system,
        cast(null as text) as panel_code,
        cast(null as text) as panel_text,
        o.code_system,
        o.code,
        coalesce(o.code_display, o.code_text) as code_text,
        o.value_quantity_value,
        o.value_quantity_comparator,
        o.value_quantity_unit,
        o.value_quantity_system,
        o.value_quantity_code,
        o.value_concept_system,
        o.value_concept_code,
        coalesce(o.value_concept_display, o.value_concept_text) as value_concept_text,
        o.value_string,
        o.value_boolean,
        o.value_integer,
        o.value_date_time_date,
        o.interpretation_code,
        o.body_site_code,
        o.reference_range_low as range_low,
        o.reference_range_high as range_high
    from {{ ref('stg_observation') }} o
    left join parents p on p.observation_key = o.id and p._source = o._source
    where p.observation_key is null
        or o.value_quantity_value is not null
        or o.value_integer is not null
        or o.value_boolean is not null
        or o.value_date_time_date is not null
        or coalesce(o.value_concept_code, o.value_concept_text, o.value_string) is not null
)

select
    v.*,
    coalesce(v.effective_start_date, v.issued_date) as day,
    coalesce({{ local_time('v.effective_start') }}, {{ local_time('v.issued') }}) as moment,
    coalesce(v.value_quantity_value, cast(v.value_integer as numeric)) as number,
    coalesce(
        {{ number_text('v.value_quantity_value') }},
        cast(v.value_integer as text),
        v.value_string,
        v.value_concept_text,
        v.value_concept_code,
        case when v.value_boolean then 'true' when not v.value_boolean then 'false' end,
        cast(v.value_date_time_date as text)
    ) as value_text,
    c.category,
    coalesce(c.is_measurement, false) as is_measurement,
    coalesce(c.is_laboratory, false) as is_laboratory
from (
    select * from single
    union all
    select * from components
) v
left join categories c on c.observation_key = v.observation_id and c._source = v._source
where coalesce(v.status, '') not in ('entered-in-error', 'cancelled')
