-- The rows of fhir.$table: new and changed ones are replaced by key, and rows that the table lost are deleted.
{{ config(
    unique_key=[$key],
    post_hook="{{ delete_missing_rows(this, '$table', [$key]) }}"
) }}

select *
from {{ fhir_table('$table') }} as rows_of_table
{% if is_incremental() %}
where {{ loaded_since_last_run() }}
{% endif %}
