CREATE VIEW audit_log AS
SELECT
    position, ts AS stated_at, kind,
    payload ->> '$.by' AS changed_by,
    split_part(kind, '.', 2) AS entity,
    coalesce(payload ->> '$.key_id', payload ->> '$.route', payload ->> '$.org') AS entity_id,
    org, producer,
    payload AS state
FROM events
WHERE log = 'CONTROL';

COMMENT ON VIEW audit_log IS 'Every statement about the deployment itself: orgs, keys, routes; who made it and when.';
COMMENT ON COLUMN audit_log.position IS 'Its place in CONTROL: 1, 2, 3, ... without gaps.';
COMMENT ON COLUMN audit_log.stated_at IS 'UTC.';
COMMENT ON COLUMN audit_log.kind IS 'Such as control.key.stated.';
COMMENT ON COLUMN audit_log.changed_by IS 'The key, or the setup, that stated it.';
COMMENT ON COLUMN audit_log.entity IS 'What it is about: org, key, route, ...';
COMMENT ON COLUMN audit_log.entity_id IS 'Which one.';
COMMENT ON COLUMN audit_log.org IS 'Whose it is; NULL where it belongs to the deployment.';
COMMENT ON COLUMN audit_log.producer IS 'The process that wrote it.';
COMMENT ON COLUMN audit_log.state IS 'The whole statement as JSON. Keys are in it as hashes only.';
