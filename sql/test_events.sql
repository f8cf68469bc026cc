-- Changes to try the connector with: run `fhir-assets connector run`, then psql "$DB_URL" -f sql/test_events.sql.
-- The people are invented. The file may be run repeatedly; it leaves only the row that is meant to fail.

-- One transaction, one patient, three rows: one PUT with all identifiers.
BEGIN;
INSERT INTO health.patient (identifier_system, identifier_value, name_family, name_given, gender, birth_date,
    phone_number, email, address_line, address_city, address_state, address_postal_code, address_country)
VALUES ('https://hospital.example.org/mrn', 'TRY-0001', 'Testperson', 'Ada', 'female', '1972-03-28',
    '+1-555-0100', 'ada@example.org', '1 Example Street', 'Springfield', 'MA', '02445', 'US');
INSERT INTO health.patient_other_identifiers (patient_id, identifier_system, identifier_value)
SELECT id, system, value FROM health.patient,
    (VALUES ('https://insurer.example.org/member', 'M-77'), ('https://lab.example.org/id', 'L-12')) AS other (system, value)
WHERE identifier_value = 'TRY-0001';
COMMIT;

-- An update that is delivered, and one that is rolled back and not delivered.
UPDATE health.patient SET phone_number = '+1-555-0199', updated_at = now() WHERE identifier_value = 'TRY-0001';
BEGIN;
UPDATE health.patient SET name_family = 'Never' WHERE identifier_value = 'TRY-0001';
ROLLBACK;

-- One identifier is removed and another one corrected: the resource on the server keeps its id.
DELETE FROM health.patient_other_identifiers WHERE identifier_value = 'L-12';
UPDATE health.patient SET identifier_value = 'TRY-0002', updated_at = now() WHERE identifier_value = 'TRY-0001';

-- A row without an identifier: `fhir-assets connector dlq list` shows why it was not delivered.
INSERT INTO health.patient (name_family, name_given) VALUES ('Nobody', 'Known');

SELECT id, txid, table_name, operation, record_id, created_at, processed_at
FROM health.fhir_outbox ORDER BY id DESC LIMIT 10;

DELETE FROM health.patient WHERE identifier_value = 'TRY-0002';
