-- What analysts ask. The names and columns here are the stable surface (docs/sql.md); the tables beneath may change.

CREATE VIEW requests AS
SELECT
    request_id, org, key_id, model, route, worker, status, http_status, code, stream,
    accepted_at, finished_at,
    queue_us / 1000.0 AS queue_ms,
    first_token_us / 1000.0 AS first_token_ms,
    duration_us / 1000.0 AS duration_ms,
    prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens, audio_prompt_tokens, audio_completion_tokens,
    (cost_pico::DECIMAL(19, 0) * 0.000000000001::DECIMAL(12, 12))::DECIMAL(38, 12) AS cost_usd,
    attempts, migrations, cached, finish_reason, estimated, prompt_hash
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
COMMENT ON COLUMN requests.attempts IS 'How many workers started on it; NULL while open.';
COMMENT ON COLUMN requests.migrations IS 'How often it moved to another worker after its first token.';
COMMENT ON COLUMN requests.cached IS 'Answered from the cache, without an attempt.';
COMMENT ON COLUMN requests.finish_reason IS 'As the client saw it: stop, length, tool_calls, ...';
COMMENT ON COLUMN requests.estimated IS 'The tokens were counted here, because the provider did not say.';
COMMENT ON COLUMN requests.prompt_hash IS 'SHA-256 in hex over the org and the messages; equal for equal prompts of one org.';

-- An attempt has up to three facts, from two witnesses: the ingress saw it start (and gave it up), the worker wrote its receipt.
-- They may be stored in any order.
CREATE VIEW attempts AS
SELECT
    r.request_id, r.epoch, r.org, r.key_id, r.route, r.worker, r.provider, r.model, r.upstream_model,
    CASE WHEN l.position IS NULL THEN r.outcome ELSE 'lost' END AS outcome,
    coalesce(l.code, r.code) AS code,
    coalesce(s.started_at, r.finished_at - to_microseconds(r.duration_us)) AS started_at,
    coalesce(l.lost_at, r.finished_at) AS finished_at,
    s.queue_us / 1000.0 AS queue_ms,
    r.first_token_us / 1000.0 AS first_token_ms,
    r.duration_us / 1000.0 AS duration_ms,
    r.prompt_tokens, r.completion_tokens, r.cached_tokens, r.reasoning_tokens, r.tokens_sent,
    r.upstream_status, r.upstream_id, r.finish_reason
FROM facts.attempt_receipts AS r
LEFT JOIN facts.attempt_starts AS s ON s.request_id = r.request_id AND s.epoch = r.epoch
LEFT JOIN facts.attempt_losses AS l ON l.request_id = r.request_id AND l.epoch = r.epoch
UNION ALL BY NAME
SELECT
    l.request_id, l.epoch, l.org, coalesce(s.route, l.route) AS route, coalesce(s.worker, l.worker) AS worker,
    'lost' AS outcome, l.code, s.started_at, l.lost_at AS finished_at, s.queue_us / 1000.0 AS queue_ms
FROM facts.attempt_losses AS l
LEFT JOIN facts.attempt_starts AS s ON s.request_id = l.request_id AND s.epoch = l.epoch
ANTI JOIN facts.attempt_receipts AS r ON r.request_id = l.request_id AND r.epoch = l.epoch
UNION ALL BY NAME
SELECT
    s.request_id, s.epoch, s.org, s.route, s.worker, 'open' AS outcome, s.started_at, s.queue_us / 1000.0 AS queue_ms
FROM facts.attempt_starts AS s
ANTI JOIN facts.attempt_receipts AS r ON r.request_id = s.request_id AND r.epoch = s.epoch
ANTI JOIN facts.attempt_losses AS l ON l.request_id = s.request_id AND l.epoch = s.epoch;

COMMENT ON VIEW attempts IS 'One row for each attempt at a request: where it ran, how it ended, and what the provider reported.';
COMMENT ON COLUMN attempts.request_id IS 'Whose attempt it is.';
COMMENT ON COLUMN attempts.epoch IS 'Its number within the request, from 1.';
COMMENT ON COLUMN attempts.org IS 'Whose request it was.';
COMMENT ON COLUMN attempts.key_id IS 'The key of the request; NULL without a receipt.';
COMMENT ON COLUMN attempts.route IS 'Where it ran.';
COMMENT ON COLUMN attempts.worker IS 'Who ran it.';
COMMENT ON COLUMN attempts.provider IS 'The kind of provider, such as openai or echo; NULL without a receipt.';
COMMENT ON COLUMN attempts.model IS 'The public name.';
COMMENT ON COLUMN attempts.upstream_model IS 'What the provider calls it.';
COMMENT ON COLUMN attempts.outcome IS 'completed, failed, cancelled, handed_back, lost (given up by the ingress), open (under way, or its receipt has not come).';
COMMENT ON COLUMN attempts.code IS 'The fault''s code, or the reason of a cancel, hand-back or loss.';
COMMENT ON COLUMN attempts.started_at IS 'UTC, when its worker said so.';
COMMENT ON COLUMN attempts.finished_at IS 'UTC, when its receipt was written, or it was given up.';
COMMENT ON COLUMN attempts.queue_ms IS 'From acceptance (or the end of the attempt before) until it started.';
COMMENT ON COLUMN attempts.first_token_ms IS 'From the worker''s start until the provider''s first token.';
COMMENT ON COLUMN attempts.duration_ms IS 'From the worker''s start to its end.';
COMMENT ON COLUMN attempts.prompt_tokens IS 'As the provider reported; NULL if it did not.';
COMMENT ON COLUMN attempts.completion_tokens IS 'As the provider reported; NULL if it did not.';
COMMENT ON COLUMN attempts.cached_tokens IS 'As the provider reported; part of prompt_tokens.';
COMMENT ON COLUMN attempts.reasoning_tokens IS 'As the provider reported; part of completion_tokens.';
COMMENT ON COLUMN attempts.tokens_sent IS 'Completion tokens that the worker sent on, as it counts them.';
COMMENT ON COLUMN attempts.upstream_status IS 'The provider''s HTTP status; NULL if there was no answer.';
COMMENT ON COLUMN attempts.upstream_id IS 'The provider''s own id of the answer.';
COMMENT ON COLUMN attempts.finish_reason IS 'As the provider gave it.';
