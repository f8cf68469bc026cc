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
