"""The outbox connector: changes of schema ``health`` go to a FHIR server, in order, once acknowledged never again.

``sql/outbox.sql`` leaves an event a change; ``outbox`` claims them, ``mapping`` makes resources of rows, ``delivery``
decides what to send, ``server`` sends it, ``settle`` writes down what came of it, ``runner`` keeps it all going.
"""
