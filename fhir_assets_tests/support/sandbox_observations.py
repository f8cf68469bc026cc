"""Small Observations for the tests of the sandbox server."""


def observation(number: int, last_updated: str, patient: str = "a", code: str = "8302-2") -> bytes:
    """Return an Observation as JSON. Its decimal value ends with a zero, which must be preserved."""
    return (
        b'{"resourceType":"Observation","id":"o%d","meta":{"versionId":"1","lastUpdated":"%b"},"status":"final",'
        b'"code":{"coding":[{"system":"http://loinc.org","code":"%b"}]},'
        b'"subject":{"reference":"Patient/%b"},"valueQuantity":{"value":1.10,"unit":"cm"}}'
    ) % (number, last_updated.encode(), code.encode(), patient.encode())


def hourly_observations(count: int) -> list[bytes]:
    """Return Observations, one per hour from 2024-01-01 on."""
    return [observation(n, f"2024-01-{1 + n // 24:02}T{n % 24:02}:00:00.000Z") for n in range(count)]
