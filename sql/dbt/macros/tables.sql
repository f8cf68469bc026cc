{#- The rows of a table of fhir_assets. The lake has the rows of one source, and no column _source. -#}
{% macro fhir_table(name) -%}
  {%- if target.type == 'duckdb' -%}
    (select *, '{{ var("lake_source") }}' as _source from {{ source('fhir', name) }})
  {%- else -%}
    {{ source('fhir', name) }}
  {%- endif -%}
{%- endmacro %}

{#- The condition for rows that were loaded since the last run. A load becomes visible when its transaction ends, and
    loaded_at is the time of its start: rows of the last load_overlap are therefore read again. -#}
{% macro loaded_since_last_run() -%}
  loaded_at > coalesce(
    (select max(loaded_at) from {{ this }}) - interval '{{ var("load_overlap") }}',
    timestamp '1900-01-01 00:00:00'
  )
{%- endmacro %}

{#- Delete the rows of a model that the table no longer has: the resource was deleted at its source (fhir.deleted says
    when), consent withholds it, or a newer version has fewer elements. -#}
{% macro delete_missing_rows(relation, name, key) -%}
  delete from {{ relation }} as m
  where not exists (
    select 1
    from {{ fhir_table(name) }} as t
    where {% for column in key %}t.{{ adapter.quote(column) }} = m.{{ adapter.quote(column) }}
      {%- if not loop.last %} and {% endif %}{% endfor %}
  )
{%- endmacro %}
