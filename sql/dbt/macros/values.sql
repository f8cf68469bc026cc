{#- A stable bigint for a resource, equal on Postgres and DuckDB; null if the id is null. The tests "unique" of the models
    fail if two resources have the same. -#}
{% macro stable_id(kind, source, id) -%}
  {%- set text = "md5('" ~ kind ~ "|' || " ~ source ~ " || '|' || " ~ id ~ ")" -%}
  {%- if target.type == 'duckdb' -%}
    cast(cast('0x' || substr({{ text }}, 1, 16) as ubigint) & 9223372036854775807 as bigint)
  {%- else -%}
    (('x' || substr({{ text }}, 1, 16))::bit(64)::bigint & 9223372036854775807)
  {%- endif -%}
{%- endmacro %}

{#- The key of a resource in Tuva's tables, where the sources of a deployment are together: its id, which only within its
    source is unique, after the name of the source, unless this is the default one; null if the id is null. -#}
{% macro source_key(source, id) -%}
  case when {{ source }} = 'default' then {{ id }} else {{ source }} || '/' || {{ id }} end
{%- endmacro %}

{#- A number whose column is text in a deployment with encryption keys: null if it is encrypted. -#}
{% macro number_or_null(number) -%}
  {%- if target.type == 'duckdb' -%}
    try_cast({{ number }} as decimal(38, 18))
  {%- else -%}
    case when cast({{ number }} as text) ~ '^-?[0-9]+([.][0-9]+)?$' then cast(cast({{ number }} as text) as numeric) end
  {%- endif -%}
{%- endmacro %}

{#- A time as it was written at the source, without its offset; midnight for a date without time. -#}
{% macro local_time(time) -%}
  case
    when {{ time }}_offset is null then cast({{ time }}_date as timestamp)
    else ({{ time }} at time zone 'UTC') + cast(ltrim({{ time }}_offset, '+') as interval)
  end
{%- endmacro %}

{#- The OMOP concept of a gender of FHIR. -#}
{% macro gender_concept(gender) -%}
  case {{ gender }} when 'male' then 8507 when 'female' then 8532 else 0 end
{%- endmacro %}

{#- A number as text, without the zeros that the decimals of the lake end with. -#}
{% macro number_text(number) -%}
  {%- if target.type == 'duckdb' -%}
    case when contains(cast({{ number }} as text), '.') then rtrim(rtrim(cast({{ number }} as text), '0'), '.') else cast({{ number }} as text) end
  {%- else -%}
    cast({{ number }} as text)
  {%- endif -%}
{%- endmacro %}

{#- An NDC with the 11 digits of claims: the parts between dashes are filled to 5, 4 and 2 digits. -#}
{% macro ndc_digits(code) -%}
  case
    when {{ code }} like '%-%-%'
      then lpad(split_part({{ code }}, '-', 1), 5, '0') || lpad(split_part({{ code }}, '-', 2), 4, '0') || lpad(split_part({{ code }}, '-', 3), 2, '0')
    else {{ code }}
  end
{%- endmacro %}

{#- A number with its unit as text, the same on both databases. -#}
{% macro quantity_text(number, unit) -%}
  {%- if target.type == 'duckdb' -%}
    {{ number_text(number) }} || coalesce(' ' || {{ unit }}, '')
  {%- else -%}
    cast(trim_scale({{ number }}) as text) || coalesce(' ' || {{ unit }}, '')
  {%- endif -%}
{%- endmacro %}
