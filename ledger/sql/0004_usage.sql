-- Sums over requests, the same columns for each way to group them.

CREATE VIEW usage_by_model AS
SELECT
    model,
    count(*) AS requests,
    count(*) FILTER (status = 'completed') AS completed,
    count(*) FILTER (status = 'failed') AS failed,
    count(*) FILTER (status = 'cancelled') AS cancelled,
    count(*) FILTER (status = 'rejected') AS rejected,
    count(*) FILTER (status = 'open') AS open,
    count(*) FILTER (cached) AS from_cache,
    coalesce(sum(prompt_tokens), 0)::BIGINT AS prompt_tokens,
    coalesce(sum(completion_tokens), 0)::BIGINT AS completion_tokens,
    coalesce(sum(cached_tokens), 0)::BIGINT AS cached_tokens,
    coalesce(sum(reasoning_tokens), 0)::BIGINT AS reasoning_tokens,
    coalesce(sum(cost_usd), 0)::DECIMAL(38, 12) AS cost_usd,
    round(quantile_cont(first_token_ms, 0.5), 3) AS first_token_ms_p50,
    round(quantile_cont(first_token_ms, 0.95), 3) AS first_token_ms_p95,
    round(quantile_cont(duration_ms, 0.5) FILTER (status = 'completed'), 3) AS duration_ms_p50,
    round(quantile_cont(duration_ms, 0.95) FILTER (status = 'completed'), 3) AS duration_ms_p95,
    min(accepted_at) AS first_at,
    max(accepted_at) AS last_at
FROM requests
GROUP BY model;

COMMENT ON VIEW usage_by_model IS 'Requests by model.';
COMMENT ON COLUMN usage_by_model.model IS 'The public name; NULL where a rejected request named none.';
COMMENT ON COLUMN usage_by_model.requests IS 'All of them, whatever became of them.';
COMMENT ON COLUMN usage_by_model.completed IS 'Answered in full.';
COMMENT ON COLUMN usage_by_model.failed IS 'Ended in an error after work had begun.';
COMMENT ON COLUMN usage_by_model.cancelled IS 'The client left.';
COMMENT ON COLUMN usage_by_model.rejected IS 'Refused before any work was done.';
COMMENT ON COLUMN usage_by_model.open IS 'Still under way.';
COMMENT ON COLUMN usage_by_model.from_cache IS 'Answered from the cache.';
COMMENT ON COLUMN usage_by_model.prompt_tokens IS 'Sum, as billed.';
COMMENT ON COLUMN usage_by_model.completion_tokens IS 'Sum, as billed.';
COMMENT ON COLUMN usage_by_model.cached_tokens IS 'Sum; part of prompt_tokens.';
COMMENT ON COLUMN usage_by_model.reasoning_tokens IS 'Sum; part of completion_tokens.';
COMMENT ON COLUMN usage_by_model.cost_usd IS 'Sum in US dollars, exact.';
COMMENT ON COLUMN usage_by_model.first_token_ms_p50 IS 'Median, of requests that had a first token.';
COMMENT ON COLUMN usage_by_model.first_token_ms_p95 IS '95th percentile of the same.';
COMMENT ON COLUMN usage_by_model.duration_ms_p50 IS 'Median, of completed requests.';
COMMENT ON COLUMN usage_by_model.duration_ms_p95 IS '95th percentile of the same.';
COMMENT ON COLUMN usage_by_model.first_at IS 'When the first of them was accepted, UTC.';
COMMENT ON COLUMN usage_by_model.last_at IS 'When the last of them was accepted, UTC.';

CREATE VIEW usage_by_route AS
SELECT
    route,
    count(*) AS requests,
    count(*) FILTER (status = 'completed') AS completed,
    count(*) FILTER (status = 'failed') AS failed,
    count(*) FILTER (status = 'cancelled') AS cancelled,
    count(*) FILTER (status = 'rejected') AS rejected,
    count(*) FILTER (status = 'open') AS open,
    count(*) FILTER (cached) AS from_cache,
    coalesce(sum(prompt_tokens), 0)::BIGINT AS prompt_tokens,
    coalesce(sum(completion_tokens), 0)::BIGINT AS completion_tokens,
    coalesce(sum(cached_tokens), 0)::BIGINT AS cached_tokens,
    coalesce(sum(reasoning_tokens), 0)::BIGINT AS reasoning_tokens,
    coalesce(sum(cost_usd), 0)::DECIMAL(38, 12) AS cost_usd,
    round(quantile_cont(first_token_ms, 0.5), 3) AS first_token_ms_p50,
    round(quantile_cont(first_token_ms, 0.95), 3) AS first_token_ms_p95,
    round(quantile_cont(duration_ms, 0.5) FILTER (status = 'completed'), 3) AS duration_ms_p50,
    round(quantile_cont(duration_ms, 0.95) FILTER (status = 'completed'), 3) AS duration_ms_p95,
    min(accepted_at) AS first_at,
    max(accepted_at) AS last_at
FROM requests
GROUP BY route;

COMMENT ON VIEW usage_by_route IS 'Requests by the route of their last attempt.';
COMMENT ON COLUMN usage_by_route.route IS 'Where the last attempt ran; NULL where none did.';
COMMENT ON COLUMN usage_by_route.requests IS 'All of them, whatever became of them.';
COMMENT ON COLUMN usage_by_route.completed IS 'Answered in full.';
COMMENT ON COLUMN usage_by_route.failed IS 'Ended in an error after work had begun.';
COMMENT ON COLUMN usage_by_route.cancelled IS 'The client left.';
COMMENT ON COLUMN usage_by_route.rejected IS 'Refused before any work was done.';
COMMENT ON COLUMN usage_by_route.open IS 'Still under way.';
COMMENT ON COLUMN usage_by_route.from_cache IS 'Answered from the cache.';
COMMENT ON COLUMN usage_by_route.prompt_tokens IS 'Sum, as billed.';
COMMENT ON COLUMN usage_by_route.completion_tokens IS 'Sum, as billed.';
COMMENT ON COLUMN usage_by_route.cached_tokens IS 'Sum; part of prompt_tokens.';
COMMENT ON COLUMN usage_by_route.reasoning_tokens IS 'Sum; part of completion_tokens.';
COMMENT ON COLUMN usage_by_route.cost_usd IS 'Sum in US dollars, exact.';
COMMENT ON COLUMN usage_by_route.first_token_ms_p50 IS 'Median, of requests that had a first token.';
COMMENT ON COLUMN usage_by_route.first_token_ms_p95 IS '95th percentile of the same.';
COMMENT ON COLUMN usage_by_route.duration_ms_p50 IS 'Median, of completed requests.';
COMMENT ON COLUMN usage_by_route.duration_ms_p95 IS '95th percentile of the same.';
COMMENT ON COLUMN usage_by_route.first_at IS 'When the first of them was accepted, UTC.';
COMMENT ON COLUMN usage_by_route.last_at IS 'When the last of them was accepted, UTC.';

CREATE VIEW usage_by_key AS
WITH names AS (
    SELECT payload ->> '$.key_id' AS key_id, arg_max(payload ->> '$.name', position) AS key_name
    FROM events
    WHERE log = 'CONTROL' AND kind = 'control.key.stated'
    GROUP BY ALL
), sums AS (
    SELECT
        org, key_id,
        count(*) AS requests,
        count(*) FILTER (status = 'completed') AS completed,
        count(*) FILTER (status = 'failed') AS failed,
        count(*) FILTER (status = 'cancelled') AS cancelled,
        count(*) FILTER (status = 'rejected') AS rejected,
        count(*) FILTER (status = 'open') AS open,
        count(*) FILTER (cached) AS from_cache,
        coalesce(sum(prompt_tokens), 0)::BIGINT AS prompt_tokens,
        coalesce(sum(completion_tokens), 0)::BIGINT AS completion_tokens,
        coalesce(sum(cached_tokens), 0)::BIGINT AS cached_tokens,
        coalesce(sum(reasoning_tokens), 0)::BIGINT AS reasoning_tokens,
        coalesce(sum(cost_usd), 0)::DECIMAL(38, 12) AS cost_usd,
        round(quantile_cont(first_token_ms, 0.5), 3) AS first_token_ms_p50,
        round(quantile_cont(first_token_ms, 0.95), 3) AS first_token_ms_p95,
        round(quantile_cont(duration_ms, 0.5) FILTER (status = 'completed'), 3) AS duration_ms_p50,
        round(quantile_cont(duration_ms, 0.95) FILTER (status = 'completed'), 3) AS duration_ms_p95,
        min(accepted_at) AS first_at,
        max(accepted_at) AS last_at
    FROM requests
    GROUP BY org, key_id
)
SELECT sums.org, sums.key_id, names.key_name, sums.* EXCLUDE (org, key_id)
FROM sums
LEFT JOIN names ON names.key_id = sums.key_id;

COMMENT ON VIEW usage_by_key IS 'Requests by key.';
COMMENT ON COLUMN usage_by_key.org IS 'Whose requests they were.';
COMMENT ON COLUMN usage_by_key.key_id IS 'The key; NULL where there was none that is known.';
COMMENT ON COLUMN usage_by_key.key_name IS 'The name that the key was given last.';
COMMENT ON COLUMN usage_by_key.requests IS 'All of them, whatever became of them.';
COMMENT ON COLUMN usage_by_key.completed IS 'Answered in full.';
COMMENT ON COLUMN usage_by_key.failed IS 'Ended in an error after work had begun.';
COMMENT ON COLUMN usage_by_key.cancelled IS 'The client left.';
COMMENT ON COLUMN usage_by_key.rejected IS 'Refused before any work was done.';
COMMENT ON COLUMN usage_by_key.open IS 'Still under way.';
COMMENT ON COLUMN usage_by_key.from_cache IS 'Answered from the cache.';
COMMENT ON COLUMN usage_by_key.prompt_tokens IS 'Sum, as billed.';
COMMENT ON COLUMN usage_by_key.completion_tokens IS 'Sum, as billed.';
COMMENT ON COLUMN usage_by_key.cached_tokens IS 'Sum; part of prompt_tokens.';
COMMENT ON COLUMN usage_by_key.reasoning_tokens IS 'Sum; part of completion_tokens.';
COMMENT ON COLUMN usage_by_key.cost_usd IS 'Sum in US dollars, exact.';
COMMENT ON COLUMN usage_by_key.first_token_ms_p50 IS 'Median, of requests that had a first token.';
COMMENT ON COLUMN usage_by_key.first_token_ms_p95 IS '95th percentile of the same.';
COMMENT ON COLUMN usage_by_key.duration_ms_p50 IS 'Median, of completed requests.';
COMMENT ON COLUMN usage_by_key.duration_ms_p95 IS '95th percentile of the same.';
COMMENT ON COLUMN usage_by_key.first_at IS 'When the first of them was accepted, UTC.';
COMMENT ON COLUMN usage_by_key.last_at IS 'When the last of them was accepted, UTC.';

CREATE VIEW usage_by_day AS
SELECT
    accepted_at::DATE AS day,
    count(*) AS requests,
    count(*) FILTER (status = 'completed') AS completed,
    count(*) FILTER (status = 'failed') AS failed,
    count(*) FILTER (status = 'cancelled') AS cancelled,
    count(*) FILTER (status = 'rejected') AS rejected,
    count(*) FILTER (status = 'open') AS open,
    count(*) FILTER (cached) AS from_cache,
    coalesce(sum(prompt_tokens), 0)::BIGINT AS prompt_tokens,
    coalesce(sum(completion_tokens), 0)::BIGINT AS completion_tokens,
    coalesce(sum(cached_tokens), 0)::BIGINT AS cached_tokens,
    coalesce(sum(reasoning_tokens), 0)::BIGINT AS reasoning_tokens,
    coalesce(sum(cost_usd), 0)::DECIMAL(38, 12) AS cost_usd,
    round(quantile_cont(first_token_ms, 0.5), 3) AS first_token_ms_p50,
    round(quantile_cont(first_token_ms, 0.95), 3) AS first_token_ms_p95,
    round(quantile_cont(duration_ms, 0.5) FILTER (status = 'completed'), 3) AS duration_ms_p50,
    round(quantile_cont(duration_ms, 0.95) FILTER (status = 'completed'), 3) AS duration_ms_p95,
    min(accepted_at) AS first_at,
    max(accepted_at) AS last_at
FROM requests
GROUP BY day;

COMMENT ON VIEW usage_by_day IS 'Requests by UTC day.';
COMMENT ON COLUMN usage_by_day.day IS 'The UTC day of acceptance.';
COMMENT ON COLUMN usage_by_day.requests IS 'All of them, whatever became of them.';
COMMENT ON COLUMN usage_by_day.completed IS 'Answered in full.';
COMMENT ON COLUMN usage_by_day.failed IS 'Ended in an error after work had begun.';
COMMENT ON COLUMN usage_by_day.cancelled IS 'The client left.';
COMMENT ON COLUMN usage_by_day.rejected IS 'Refused before any work was done.';
COMMENT ON COLUMN usage_by_day.open IS 'Still under way.';
COMMENT ON COLUMN usage_by_day.from_cache IS 'Answered from the cache.';
COMMENT ON COLUMN usage_by_day.prompt_tokens IS 'Sum, as billed.';
COMMENT ON COLUMN usage_by_day.completion_tokens IS 'Sum, as billed.';
COMMENT ON COLUMN usage_by_day.cached_tokens IS 'Sum; part of prompt_tokens.';
COMMENT ON COLUMN usage_by_day.reasoning_tokens IS 'Sum; part of completion_tokens.';
COMMENT ON COLUMN usage_by_day.cost_usd IS 'Sum in US dollars, exact.';
COMMENT ON COLUMN usage_by_day.first_token_ms_p50 IS 'Median, of requests that had a first token.';
COMMENT ON COLUMN usage_by_day.first_token_ms_p95 IS '95th percentile of the same.';
COMMENT ON COLUMN usage_by_day.duration_ms_p50 IS 'Median, of completed requests.';
COMMENT ON COLUMN usage_by_day.duration_ms_p95 IS '95th percentile of the same.';
COMMENT ON COLUMN usage_by_day.first_at IS 'When the first of them was accepted, UTC.';
COMMENT ON COLUMN usage_by_day.last_at IS 'When the last of them was accepted, UTC.';
