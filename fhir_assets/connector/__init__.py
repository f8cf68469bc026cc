"""The outbox connector: changes of schema ``health`` go to a FHIR server, in order, once acknowledged never again.

``outbox.sql`` leaves an event a change; ``outbox`` claims and settles them, ``mapping`` makes resources of rows,
``delivery`` decides what to send, ``server`` sends it, ``runner`` keeps it all going.
"""
