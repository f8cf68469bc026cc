{#- A key of a table of fhir_assets leads to a row of the same source. -#}
{% test reference_key(model, column_name, to, field) %}
select c.{{ column_name }}
from {{ model }} as c
left join {{ to }} as p on p.{{ field }} = c.{{ column_name }}{% if target.type != 'duckdb' %} and p._source = c._source{% endif %}
where c.{{ column_name }} is not null and p.{{ field }} is null
{% endtest %}
