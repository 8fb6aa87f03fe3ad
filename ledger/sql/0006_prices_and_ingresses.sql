-- Whether a request's price was known, and whose an open request is: so that it can be closed when its ingress dies.

ALTER TABLE facts.request_opens ADD COLUMN ingress VARCHAR;
ALTER TABLE facts.request_opens ADD COLUMN announced BOOLEAN;

UPDATE facts.request_opens AS o SET ingress = e.producer, announced = false
FROM events AS e WHERE e.log = 'EVENTS' AND e.position = o.position;

-- The one change that was ever made to rows of an append-only table: a column that they didn't have.
DROP TRIGGER request_ends_no_update ON facts.request_ends;
DROP TRIGGER request_ends_no_delete ON facts.request_ends;

ALTER TABLE facts.request_ends ADD COLUMN price_known BOOLEAN;

UPDATE facts.request_ends AS r SET price_known = NOT coalesce((e.payload ->> '$.price.unknown')::BOOLEAN, false)
FROM events AS e WHERE e.log = 'EVENTS' AND e.position = r.position AND e.kind = 'request.finished';

CREATE TRIGGER request_ends_no_update AFTER UPDATE ON facts.request_ends
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
INSERT INTO state.guard SELECT error('the ledger is append-only: no UPDATE on facts.request_ends') FROM old_rows LIMIT 1;

CREATE TRIGGER request_ends_no_delete AFTER DELETE ON facts.request_ends
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
INSERT INTO state.guard SELECT error('the ledger is append-only: no DELETE on facts.request_ends') FROM old_rows LIMIT 1;

CREATE OR REPLACE VIEW requests AS
SELECT
    request_id, org, key_id, model, route, worker, status, http_status, code, stream,
    accepted_at, finished_at,
    queue_us / 1000.0 AS queue_ms,
    first_token_us / 1000.0 AS first_token_ms,
    duration_us / 1000.0 AS duration_ms,
    prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, audio_prompt_tokens, audio_completion_tokens,
    (cost_pico::DECIMAL(19, 0) * 0.000000000001::DECIMAL(12, 12))::DECIMAL(38, 12) AS cost_usd,
    attempts, migrations, cached, finish_reason, estimated, prompt_hash, price_known
FROM facts.request_ends
UNION ALL BY NAME
SELECT request_id, org, key_id, model, 'open' AS status, stream, accepted_at, prompt_hash
FROM facts.request_opens;

COMMENT ON VIEW requests IS 'One row for each request: finished, rejected, or still under way.';
COMMENT ON COLUMN requests.request_id IS 'UUIDv7; a completion''s id is chatcmpl- and the same 32 hex digits.';
COMMENT ON COLUMN requests.org IS 'Whose request it was.';
COMMENT ON COLUMN requests.key_id IS 'The key it was made with; NULL if there was none that is known.';
COMMENT ON COLUMN requests.model IS 'The public name that was asked for.';
COMMENT ON COLUMN requests.route IS 'Where the last attempt ran; NULL if none did.';
COMMENT ON COLUMN requests.worker IS 'Who ran the last attempt.';
COMMENT ON COLUMN requests.status IS 'completed, failed, cancelled (the client left), rejected (refused before any work), open (under way).';
COMMENT ON COLUMN requests.http_status IS 'What the client got; NULL while open.';
COMMENT ON COLUMN requests.code IS 'The error''s code, or why it was cancelled or rejected; NULL if it completed.';
COMMENT ON COLUMN requests.stream IS 'The client asked for a stream.';
COMMENT ON COLUMN requests.accepted_at IS 'UTC; for a rejected request, when it was rejected.';
COMMENT ON COLUMN requests.finished_at IS 'UTC; NULL while open.';
COMMENT ON COLUMN requests.queue_ms IS 'From acceptance until a worker started.';
COMMENT ON COLUMN requests.first_token_ms IS 'From acceptance until the first chunk was ready for the client.';
COMMENT ON COLUMN requests.duration_ms IS 'From acceptance to the end.';
COMMENT ON COLUMN requests.prompt_tokens IS 'As billed; all classes of prompt tokens together.';
COMMENT ON COLUMN requests.completion_tokens IS 'As billed; all classes of completion tokens together.';
COMMENT ON COLUMN requests.cached_tokens IS 'The part of prompt_tokens that the provider had cached.';
COMMENT ON COLUMN requests.reasoning_tokens IS 'The part of completion_tokens that was reasoning.';
COMMENT ON COLUMN requests.audio_prompt_tokens IS 'The part of prompt_tokens that was audio.';
COMMENT ON COLUMN requests.audio_completion_tokens IS 'The part of completion_tokens that was audio.';
COMMENT ON COLUMN requests.cost_usd IS 'US dollars, exact to the pico-dollar; NULL while open.';
COMMENT ON COLUMN requests.price_known IS 'False where nobody had stated a price, so that cost_usd is 0 and yet not free; NULL while open or if rejected.';
COMMENT ON COLUMN requests.attempts IS 'How many workers started on it; NULL while open.';
COMMENT ON COLUMN requests.migrations IS 'How often it moved to another worker after its first token.';
COMMENT ON COLUMN requests.cached IS 'Answered from the cache, without an attempt.';
COMMENT ON COLUMN requests.finish_reason IS 'As the client saw it: stop, length, tool_calls, ...';
COMMENT ON COLUMN requests.estimated IS 'The tokens were counted here, because the provider did not say.';
COMMENT ON COLUMN requests.prompt_hash IS 'SHA-256 in hex over the org and the messages; equal for equal prompts of one org.';
