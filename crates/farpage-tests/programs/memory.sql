-- An in-memory database several times the budget: filled, indexed, joined, changed, checked.
PRAGMA cache_size = -1000000;
PRAGMA temp_store = MEMORY;
CREATE TABLE item (id INTEGER PRIMARY KEY, grp INTEGER, name TEXT, body TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
INSERT INTO item SELECT i, (i * 7919) % 997, 'name ' || ((i * 104729) % 100003), hex(i * 2654435761) || substr('the quick brown fox jumps over the lazy dog, again and again and again, until the page is full of words that repeat', 1 + i % 20) || printf('%080d', i * 31) FROM n;
CREATE INDEX by_group ON item(grp);
CREATE INDEX by_name ON item(name);
SELECT count(*), sum(length(body)), sum(id) FROM item;
SELECT grp, count(*), min(name), max(id) FROM item GROUP BY grp ORDER BY grp LIMIT 20;
UPDATE item SET body = body || name WHERE grp % 10 = 3;
DELETE FROM item WHERE grp % 10 = 4;
SELECT count(*), sum(length(body)), total(id) FROM item;
SELECT a.id, b.id FROM item a JOIN item b ON b.name = a.name AND b.id > a.id ORDER BY a.id LIMIT 10;
SELECT id, name FROM item ORDER BY body DESC LIMIT 10;
PRAGMA integrity_check;
