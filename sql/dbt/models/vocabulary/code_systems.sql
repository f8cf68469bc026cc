-- The code systems of FHIR, with the names that OMOP and Tuva give them.
select
    cast(system as text) as system,
    cast(vocabulary_id as text) as vocabulary_id,
    cast(code_type as text) as code_type
from (
    values
        ('http://snomed.info/sct', 'SNOMED', 'snomed-ct'),
        ('http://loinc.org', 'LOINC', 'loinc'),
        ('http://www.nlm.nih.gov/research/umls/rxnorm', 'RxNorm', 'rxnorm'),
        ('http://hl7.org/fhir/sid/icd-10-cm', 'ICD10CM', 'icd-10-cm'),
        ('http://hl7.org/fhir/sid/icd-10', 'ICD10', 'icd-10'),
        ('http://hl7.org/fhir/sid/icd-9-cm', 'ICD9CM', 'icd-9-cm'),
        ('http://www.cms.gov/Medicare/Coding/ICD10', 'ICD10PCS', 'icd-10-pcs'),
        ('http://hl7.org/fhir/sid/ndc', 'NDC', 'ndc'),
        ('http://hl7.org/fhir/sid/cvx', 'CVX', 'cvx'),
        ('http://www.ama-assn.org/go/cpt', 'CPT4', 'cpt'),
        ('https://www.cms.gov/Medicare/Coding/HCPCSReleaseCodeSets', 'HCPCS', 'hcpcs'),
        ('http://unitsofmeasure.org', 'UCUM', 'ucum'),
        ('http://nucc.org/provider-taxonomy', 'NUCC', 'nucc'),
        ('https://www.nubc.org/CodeSystem/RevenueCodes', 'Revenue Code', 'revenue-code'),
        ('https://nahdo.org/sopt', 'SOPT', 'sopt'),
        ('urn:iso:std:iso:4217', 'Currency', 'currency')
) as known (system, vocabulary_id, code_type)
