-- What wrk sends, and what it tells at the end. The mode is the first argument after "--":
--   plain          the same request again and again: wrk's fastest way, nothing is called for a request
--   pipelined N    N requests at once on each connection
--   post N         a POST with N bytes of content
--   files N        /many/0.txt to /many/(N-1).txt, each as often, in an order that no cache can foresee
-- A function `response` would see every answer, but take more time than the server: so status and bytes are summed up.

function init(args)
  if args[1] == "pipelined" then
    local batch = wrk.format():rep(tonumber(args[2]))
    request = function() return batch end
  elseif args[1] == "post" then
    wrk.method, wrk.body = "POST", string.rep("x", tonumber(args[2]))
  elseif args[1] == "files" then
    local count, requests, at = tonumber(args[2]), {}, 0
    for i = 1, count do requests[i] = wrk.format("GET", "/many/" .. i - 1 .. ".txt") end
    -- A stride without a divisor in common with N meets every file once before it meets one again.
    request = function()
      at = (at + 6367) % count
      return requests[at + 1]
    end
  end
end

function done(summary)
  local errors = summary.errors
  io.write(string.format("summary %d %d %d %d\n", summary.requests, summary.duration, summary.bytes,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
