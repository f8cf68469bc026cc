"""The outbox connector: delivers changes of the tables in schema ``health`` to a FHIR server.

Triggers (``sql/outbox.sql``) insert an event for each change into the outbox. ``outbox`` claims events, ``mapping``
turns rows into resources, ``delivery`` decides which requests to send, ``server`` sends them, ``outcomes`` records
their results, and ``runner`` coordinates the threads. The changes of a record are delivered in order; a change that the
server acknowledged is not delivered again.
"""
