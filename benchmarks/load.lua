-- What wrk asks for, and its figures as a line of JSON. The environment holds the key, LOAD_TOKEN, and, where edits are
-- posted, LOAD_SOURCE, with which each source begins; with LOAD_ONCE each has an Idempotency-Key.
local threads, token, source = {}, os.getenv("LOAD_TOKEN"), os.getenv("LOAD_SOURCE")
local sent = 0
refused = 0 -- global: `done` reads it of each thread

function setup(thread)
   table.insert(threads, thread)
   thread:set("number", #threads)
end

function init()
   if token then wrk.headers["Authorization"] = "Bearer " .. token end
   if source then wrk.headers["Content-Type"] = "application/json" end
end

function request()
   if not source then return wrk.format("GET") end
   sent = sent + 1
   local name = source .. " " .. number .. " " .. sent
   if os.getenv("LOAD_ONCE") then wrk.headers["Idempotency-Key"] = (name:gsub(" ", "-")) end
   return wrk.format("POST", nil, nil, '{"source": "' .. name .. '", "destination": {"prompt": "a red fox"}}')
end

function response(status)
   if status < 200 or status > 299 then refused = refused + 1 end
end

function done(summary, latency)
   local other, errors = 0, summary.errors
   for _, thread in ipairs(threads) do other = other + thread:get("refused") end
   print(string.format(
      '{"requests": %d, "seconds": %f, "bytes": %d, "p50_ms": %f, "p99_ms": %f, "refused": %d, "broken": %d}',
      summary.requests, summary.duration / 1e6, summary.bytes, latency:percentile(50) / 1e3,
      latency:percentile(99) / 1e3, other, errors.connect + errors.read + errors.write + errors.timeout))
end
