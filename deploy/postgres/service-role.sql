-- Run once, when the database is made: the role that API and workers connect as. It owns nothing; what it may do,
-- `emender migrate --service-role emender` says (docs/decisions/0018-history-is-append-only-by-trigger-and-by-grant.md).
\set password `cat /run/secrets/service-password`
CREATE ROLE emender LOGIN PASSWORD :'password';
