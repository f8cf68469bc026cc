{#- The columns identify a row of a table of fhir_assets within its source, and are never null. -#}
{% test row_key(model, columns) %}
{%- set key = columns | map('tojson') | join(', ') %}
select {{ key }}
from {{ model }}
group by {{ key }}{% if target.type != 'duckdb' %}, _source{% endif %}
having count(*) > 1{% for column in columns %} or {{ column | tojson }} is null{% endfor %}
{% endtest %}
