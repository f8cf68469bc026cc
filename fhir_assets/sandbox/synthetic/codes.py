"""Codes of public code systems with their displays, rendered once as the JSON of CodeableConcepts."""

from dataclasses import dataclass

LOINC = "http://loinc.org"
SNOMED = "http://snomed.info/sct"
RXNORM = "http://www.nlm.nih.gov/research/umls/rxnorm"
ICD10 = "http://hl7.org/fhir/sid/icd-10-cm"
CVX = "http://hl7.org/fhir/sid/cvx"
CPT = "http://www.ama-assn.org/go/cpt"
UCUM = "http://unitsofmeasure.org"
HL7 = "http://terminology.hl7.org/CodeSystem/"


def coding(system: str, code: str, display: str = "") -> str:
    """Return the JSON of a Coding."""
    shown = f',"display":"{display}"' if display else ""
    return f'{{"system":"{system}","code":"{code}"{shown}}}'


def concept(system: str, code: str, display: str, text: str = "") -> str:
    """Return the JSON of a CodeableConcept with one coding."""
    return f'{{"coding":[{coding(system, code, display)}],"text":"{text or display}"}}'


def hl7(name: str, code: str, display: str = "") -> str:
    """Return the JSON of a CodeableConcept from a code system of HL7, without a text."""
    return f'{{"coding":[{coding(HL7 + name, code, display)}]}}'


@dataclass(frozen=True, slots=True)
class Measure:
    """A measurement: its code, its UCUM unit, the range of healthy values, and the number of decimal places."""

    code: str
    name: str
    unit: str
    low: float
    high: float
    places: int


def _measure(code: str, name: str, unit: str, low: float, high: float, places: int) -> Measure:
    return Measure(concept(LOINC, code, name), name, unit, low, high, places)


VITALS = (
    _measure("8867-4", "Heart rate", "/min", 60, 100, 0),
    _measure("9279-1", "Respiratory rate", "/min", 12, 18, 0),
    _measure("8310-5", "Body temperature", "Cel", 36.1, 37.2, 1),
    _measure("2708-6", "Oxygen saturation in Arterial blood", "%", 95, 100, 0),
    _measure("72514-3", "Pain severity - 0-10 verbal numeric rating [Score] - Reported", "{score}", 0, 4, 0),
)
HEIGHT = _measure("8302-2", "Body height", "cm", 150, 195, 1)
WEIGHT = _measure("29463-7", "Body weight", "kg", 50, 110, 1)
BMI = _measure("39156-5", "Body mass index (BMI) [Ratio]", "kg/m2", 18.5, 25, 2)
BLOOD_PRESSURE = concept(LOINC, "85354-9", "Blood pressure panel with all children optional")
SYSTOLIC = concept(LOINC, "8480-6", "Systolic blood pressure")
DIASTOLIC = concept(LOINC, "8462-4", "Diastolic blood pressure")
SMOKING = concept(LOINC, "72166-2", "Tobacco smoking status")
SMOKING_ANSWERS = (
    concept(SNOMED, "266919005", "Never smoked tobacco"),
    concept(SNOMED, "8517006", "Ex-smoker"),
    concept(SNOMED, "449868002", "Smokes tobacco daily"),
)


@dataclass(frozen=True, slots=True)
class Panel:
    """A laboratory report and its measurements."""

    code: str
    name: str
    measures: tuple[Measure, ...]


PANELS = (
    Panel(
        concept(LOINC, "24331-1", "Lipid 1996 panel - Serum or Plasma"),
        "Lipid panel",
        (
            _measure("2093-3", "Cholesterol [Mass/volume] in Serum or Plasma", "mg/dL", 125, 200, 0),
            _measure("2571-8", "Triglyceride [Mass/volume] in Serum or Plasma", "mg/dL", 50, 150, 0),
            _measure("2085-9", "Cholesterol in HDL [Mass/volume] in Serum or Plasma", "mg/dL", 40, 80, 0),
            _measure(
                "13457-7", "Cholesterol in LDL [Mass/volume] in Serum or Plasma by calculation", "mg/dL", 50, 100, 0
            ),
        ),
    ),
    Panel(
        concept(LOINC, "51990-0", "Basic metabolic panel - Blood"),
        "Basic metabolic panel",
        (
            _measure("2339-0", "Glucose [Mass/volume] in Blood", "mg/dL", 70, 110, 0),
            _measure("2160-0", "Creatinine [Mass/volume] in Serum or Plasma", "mg/dL", 0.6, 1.2, 2),
            _measure("2951-2", "Sodium [Moles/volume] in Serum or Plasma", "mmol/L", 136, 145, 0),
            _measure("2823-3", "Potassium [Moles/volume] in Serum or Plasma", "mmol/L", 3.5, 5.1, 2),
            _measure("17861-6", "Calcium [Mass/volume] in Serum or Plasma", "mg/dL", 8.5, 10.2, 1),
        ),
    ),
    Panel(
        concept(LOINC, "58410-2", "CBC panel - Blood by Automated count"),
        "Complete blood count",
        (
            _measure("6690-2", "Leukocytes [#/volume] in Blood by Automated count", "10*3/uL", 4.5, 11, 2),
            _measure("718-7", "Hemoglobin [Mass/volume] in Blood", "g/dL", 12, 17.5, 1),
            _measure("4544-3", "Hematocrit [Volume Fraction] of Blood by Automated count", "%", 36, 50, 1),
            _measure("777-3", "Platelets [#/volume] in Blood by Automated count", "10*3/uL", 150, 450, 0),
        ),
    ),
    Panel(
        concept(LOINC, "4548-4", "Hemoglobin A1c/Hemoglobin.total in Blood"),
        "Hemoglobin A1c",
        (_measure("4548-4", "Hemoglobin A1c/Hemoglobin.total in Blood", "%", 4, 5.6, 1),),
    ),
)


@dataclass(frozen=True, slots=True)
class Disorder:
    """A condition, whether it is chronic, and its medication (an index of MEDICATIONS)."""

    code: str
    name: str
    chronic: bool
    medication: int


def _disorder(snomed: str, icd10: str, name: str, chronic: bool, medication: int) -> Disorder:
    both = f"{coding(SNOMED, snomed, name)},{coding(ICD10, icd10)}"
    return Disorder(f'{{"coding":[{both}],"text":"{name}"}}', name, chronic, medication)


@dataclass(frozen=True, slots=True)
class Drug:
    """A medication: its concept, the unit of its dose form, and the number of doses a day."""

    code: str
    name: str
    unit: str
    daily: int


def _drug(rxnorm: str, name: str, unit: str = "tablet", daily: int = 1) -> Drug:
    return Drug(concept(RXNORM, rxnorm, name), name, unit, daily)


MEDICATIONS = (
    _drug("314076", "lisinopril 10 MG Oral Tablet"),
    _drug("860975", "24 HR metformin hydrochloride 500 MG Extended Release Oral Tablet", daily=2),
    _drug("312961", "simvastatin 20 MG Oral Tablet"),
    _drug("197361", "amlodipine 5 MG Oral Tablet"),
    _drug("310798", "hydrochlorothiazide 25 MG Oral Tablet"),
    _drug("313782", "acetaminophen 325 MG Oral Tablet", daily=4),
    _drug("308192", "amoxicillin 500 MG Oral Tablet", daily=3),
    _drug("310965", "ibuprofen 200 MG Oral Tablet", daily=3),
    _drug("745679", "200 ACTUAT albuterol 0.09 MG/ACTUAT Metered Dose Inhaler", "puff", 4),
    _drug("966222", "levothyroxine sodium 0.075 MG Oral Tablet"),
    _drug("309362", "clopidogrel 75 MG Oral Tablet"),
    _drug("855332", "warfarin sodium 5 MG Oral Tablet"),
    _drug("312615", "prednisone 20 MG Oral Tablet"),
    _drug("849574", "naproxen sodium 220 MG Oral Tablet", daily=2),
)

DISORDERS = (
    _disorder("59621000", "I10", "Essential hypertension", True, 0),
    _disorder("44054006", "E11.9", "Diabetes mellitus type 2", True, 1),
    _disorder("55822004", "E78.5", "Hyperlipidemia", True, 2),
    _disorder("195967001", "J45.909", "Asthma", True, 8),
    _disorder("40930008", "E03.9", "Hypothyroidism", True, 9),
    _disorder("49436004", "I48.91", "Atrial fibrillation", True, 11),
    _disorder("13645005", "J44.9", "Chronic obstructive lung disease", True, 8),
    _disorder("396275006", "M19.90", "Osteoarthritis", True, 13),
    _disorder("195662009", "J02.8", "Acute viral pharyngitis", False, 5),
    _disorder("444814009", "J01.90", "Viral sinusitis", False, 5),
    _disorder("10509002", "J20.9", "Acute bronchitis", False, 12),
    _disorder("68566005", "N39.0", "Urinary tract infectious disease", False, 6),
    _disorder("279039007", "M54.50", "Low back pain", False, 7),
)

PROCEDURES = (
    concept(SNOMED, "430193006", "Medication reconciliation"),
    concept(SNOMED, "171207006", "Depression screening"),
    concept(SNOMED, "710824005", "Assessment of health and social care needs"),
    concept(SNOMED, "29303009", "Electrocardiographic procedure"),
    concept(SNOMED, "399208008", "Plain chest X-ray"),
    concept(SNOMED, "73761001", "Colonoscopy"),
    concept(SNOMED, "23426006", "Measurement of respiratory function"),
)
VACCINES = (
    concept(CVX, "140", "Influenza, split virus, trivalent, PF"),
    concept(CVX, "115", "Tdap"),
    concept(CVX, "113", "Td (adult), 5 Lf tetanus toxoid, preservative free, adsorbed"),
    concept(CVX, "133", "Pneumococcal conjugate PCV 13"),
    concept(CVX, "187", "zoster recombinant"),
    concept(CVX, "43", "Hep B, adult"),
    concept(CVX, "208", "COVID-19, mRNA, LNP-S, PF, 30 mcg/0.3 mL dose"),
)
ALLERGIES = (
    ("food", concept(SNOMED, "91935009", "Allergy to peanut")),
    ("medication", concept(SNOMED, "91936005", "Allergy to penicillin")),
    ("food", concept(SNOMED, "300913006", "Allergy to shellfish")),
    ("environment", concept(SNOMED, "232350006", "Allergy to house dust mite")),
    ("environment", concept(SNOMED, "418689008", "Allergy to grass pollen")),
)
REACTIONS = (
    concept(SNOMED, "247472004", "Wheal"),
    concept(SNOMED, "271807003", "Eruption of skin"),
    concept(SNOMED, "267036007", "Dyspnea"),
    concept(SNOMED, "39579001", "Anaphylaxis"),
)
DEVICES = (
    ("Blood glucose meter", concept(SNOMED, "337414009", "Blood glucose meter")),
    ("Implantable cardiac pacemaker", concept(SNOMED, "706004007", "Implantable cardiac pacemaker")),
    ("Nebulizer", concept(SNOMED, "170615005", "Home nebulizer")),
)


@dataclass(frozen=True, slots=True)
class VisitKind:
    """A kind of encounter: its class, type, billing code, duration in minutes, and price in US dollars."""

    act: str
    type: str
    service: str
    minutes: int
    price: int


VISITS = (
    VisitKind(
        coding(HL7 + "v3-ActCode", "AMB", "ambulatory"),
        concept(SNOMED, "185349003", "Encounter for check up"),
        concept(CPT, "99213", "Office or other outpatient visit, established patient, 20 minutes"),
        30,
        128,
    ),
    VisitKind(
        coding(HL7 + "v3-ActCode", "AMB", "ambulatory"),
        concept(SNOMED, "390906007", "Follow-up encounter"),
        concept(CPT, "99212", "Office or other outpatient visit, established patient, 10 minutes"),
        15,
        77,
    ),
    VisitKind(
        coding(HL7 + "v3-ActCode", "EMER", "emergency"),
        concept(SNOMED, "50849002", "Emergency room admission"),
        concept(CPT, "99284", "Emergency department visit, moderate medical decision making"),
        240,
        514,
    ),
    VisitKind(
        coding(HL7 + "v3-ActCode", "IMP", "inpatient encounter"),
        concept(SNOMED, "32485007", "Hospital admission"),
        concept(CPT, "99223", "Initial hospital inpatient care, high medical decision making"),
        4320,
        8390,
    ),
    VisitKind(
        coding(HL7 + "v3-ActCode", "VR", "virtual"),
        concept(SNOMED, "448337001", "Telemedicine consultation with patient"),
        concept(CPT, "99441", "Telephone evaluation and management service, 5-10 minutes"),
        10,
        55,
    ),
)
EMERGENCY, INPATIENT = 2, 3
"""Indices of kinds of visits in ``VISITS``."""
