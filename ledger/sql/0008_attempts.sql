COMMENT ON COLUMN requests.route IS 'Where the last attempt ran, or waited in the queue; NULL if there was none.';
COMMENT ON COLUMN requests.attempts IS 'How many attempts were made, those among them that no worker began; NULL while open.';
