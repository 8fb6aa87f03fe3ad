-- A guard rail against mistakes: what is written is never changed. Not a security boundary (whoever owns the file can drop it);
-- the proof that nothing was changed is in hashes over the log, not here.
-- A trigger may not write to its own table, so the error is raised on the way into another, which stays empty.

CREATE TABLE state.guard (nothing VARCHAR);

CREATE TRIGGER events_no_update AFTER UPDATE ON events
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
INSERT INTO state.guard SELECT error('the ledger is append-only: no UPDATE on events') FROM old_rows LIMIT 1;

CREATE TRIGGER events_no_delete AFTER DELETE ON events
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
INSERT INTO state.guard SELECT error('the ledger is append-only: no DELETE on events') FROM old_rows LIMIT 1;

CREATE TRIGGER request_ends_no_update AFTER UPDATE ON facts.request_ends
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
INSERT INTO state.guard SELECT error('the ledger is append-only: no UPDATE on facts.request_ends') FROM old_rows LIMIT 1;

CREATE TRIGGER request_ends_no_delete AFTER DELETE ON facts.request_ends
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
INSERT INTO state.guard SELECT error('the ledger is append-only: no DELETE on facts.request_ends') FROM old_rows LIMIT 1;

CREATE TRIGGER attempt_starts_no_update AFTER UPDATE ON facts.attempt_starts
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
INSERT INTO state.guard SELECT error('the ledger is append-only: no UPDATE on facts.attempt_starts') FROM old_rows LIMIT 1;

CREATE TRIGGER attempt_starts_no_delete AFTER DELETE ON facts.attempt_starts
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
INSERT INTO state.guard SELECT error('the ledger is append-only: no DELETE on facts.attempt_starts') FROM old_rows LIMIT 1;

CREATE TRIGGER attempt_losses_no_update AFTER UPDATE ON facts.attempt_losses
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
INSERT INTO state.guard SELECT error('the ledger is append-only: no UPDATE on facts.attempt_losses') FROM old_rows LIMIT 1;

CREATE TRIGGER attempt_losses_no_delete AFTER DELETE ON facts.attempt_losses
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
INSERT INTO state.guard SELECT error('the ledger is append-only: no DELETE on facts.attempt_losses') FROM old_rows LIMIT 1;

CREATE TRIGGER attempt_receipts_no_update AFTER UPDATE ON facts.attempt_receipts
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
INSERT INTO state.guard SELECT error('the ledger is append-only: no UPDATE on facts.attempt_receipts') FROM old_rows LIMIT 1;

CREATE TRIGGER attempt_receipts_no_delete AFTER DELETE ON facts.attempt_receipts
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT
INSERT INTO state.guard SELECT error('the ledger is append-only: no DELETE on facts.attempt_receipts') FROM old_rows LIMIT 1;
