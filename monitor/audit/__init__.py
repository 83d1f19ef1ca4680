"""The audit trail: events in hash-chained, keyed records, in a database or in files. Knows no engine and no HTTP."""
