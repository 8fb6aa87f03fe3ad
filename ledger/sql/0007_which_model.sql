COMMENT ON COLUMN requests.model IS 'The public name of the model that answered, or else of the one that was asked for.';
