#!lua name=millrace1
-- Every move of the protocol, each one atomic and safe to retry. The keys are told at the top of redis.py.
--
-- Time is this library's own: it follows Redis's clock, but one call moves it by a second at most and never back. So
-- neither a step of that clock nor an hour without Redis makes every lease and every deadline end at once. All times
-- are milliseconds of it.
--
-- Ledger. A request is in exactly one of three places: waiting (in a `rdy` set and in `wait`), running (in the `held`
-- set of one worker, with that claim's token in `lk`), or ended (its log has the terminal entry). Only `enqueue`,
-- `take`, `requeue` and `terminal` move it. A write of a worker is accepted only with the current `lk`.

local TICK_MS, AGEING_MS = 1000, 10000
local SLACK_MS, WEEK_MS = 600000, 8 * 86400000 -- real expiry, should nobody be left to clean up
local SCAN = 200 -- waiting requests that a claim looks at
local CRASHED, LOST = 3, 1 -- what counts against each request of an engine that failed by itself, or for unknown reasons
local SUSPECTS = {16, 4, 1} -- how many requests with 3, 6, 9 counts a worker holds at once: halving isolates the culprit
local CLEARED, GUILTY, MAX_ATTEMPTS = 16, 12, 100 -- tokens past a crash that clear a request; counts that end it
local UNSEEN = 2 -- steps that a worker may have computed and not committed: so far one crash lies behind another
local POISON = 'this request made every engine fail that tried to compute it'

local K, NOW, frames

local function call(...) return redis.call(...) end

local function begin(keys)
  K, frames = string.sub(keys[1], 1, -6), {} -- without 'clock'
  local t = call('TIME')
  local wall = t[1] * 1000 + math.floor(t[2] / 1000)
  local c = call('HMGET', keys[1], 'wall', 'ms')
  NOW = c[1] and c[2] + math.max(0, math.min(wall - c[1], TICK_MS)) or wall
  call('HSET', keys[1], 'wall', wall, 'ms', NOW)
end

local function flush(reply)
  for api, list in pairs(frames) do call('PUBLISH', K .. 'mail:' .. api, cmsgpack.pack(list)) end
  return reply
end

local FIELDS = {'st', 'lk', 'wk', 'n', 'num', 'q', 'tn', 'cl', 'tag', 'size', 't0', 'qms', 'ft', 'dl', 'qd', 'orphan', 'keep',
  'cx', 'c', 'cn', 'at', 'mb', 'idem'}
local NUMBERS = {'n', 'num', 'tag', 'size', 't0', 'qms', 'ft', 'dl', 'qd', 'orphan', 'keep', 'c', 'cn', 'at'}

local function record(rid)
  local values = call('HMGET', K .. 'r:' .. rid, unpack(FIELDS))
  if not values[1] then return nil end
  local h = {id = rid}
  for i, name in ipairs(FIELDS) do h[name] = values[i] end
  for _, name in ipairs(NUMBERS) do h[name] = tonumber(h[name]) end -- '' and false become nil
  return h
end

local function set(h, ...)
  call('HSET', K .. 'r:' .. h.id, ...)
end

local function bump(queue, name, by)
  return call('HINCRBY', K .. 'q:' .. queue, name, by)
end

-- the queue ------------------------------------------------------------------------------------------------------------

local function ready(h) return K .. 'rdy:' .. h.q .. ':' .. h.cl end

local function enqueue(h)
  call('ZADD', ready(h), h.tag, h.id)
  call('ZADD', K .. 'wait:' .. h.q, h.t0, h.id)
  bump(h.q, 'tokens', h.size)
  call('PUBLISH', K .. 'bell:' .. h.q, '')
end

local function dequeue(h)
  call('ZREM', ready(h), h.id)
  if call('EXISTS', ready(h)) == 0 then -- the end of a busy period: what tenants owe each other is settled
    local q, v = K .. 'q:' .. h.q, call('HMGET', K .. 'q:' .. h.q, 'v' .. h.cl, 'm' .. h.cl)
    call('HSET', q, 'v' .. h.cl, math.max(tonumber(v[1]) or 0, tonumber(v[2]) or 0))
  end
  call('ZREM', K .. 'wait:' .. h.q, h.id)
  bump(h.q, 'tokens', -h.size)
end

local function due(h, ms)
  if ms then call('ZADD', K .. 'due', ms, h.id) else call('ZREM', K .. 'due', h.id) end
end

local function waiting_deadline(h)
  if h.qms or not h.qd then return h.dl end -- the queue's own counts until the first claim
  return h.dl and math.min(h.dl, h.qd) or h.qd
end

local function leave_worker(h)
  call('SREM', K .. 'held:' .. h.wk, h.id)
  bump(h.q, 'running', -1)
end

local function requeue(h)
  leave_worker(h)
  set(h, 'st', 'w', 'lk', '', 'wk', '')
  h.st = 'w'
  due(h, h.dl)
  enqueue(h)
end

-- the end --------------------------------------------------------------------------------------------------------------

local function frame(mb, rid, raw, timings)
  for api in string.gmatch(mb, '%S+') do
    local list = frames[api] or {}
    frames[api] = list
    list[#list + 1] = {rid, raw, timings}
  end
end

local function measure_end(queue)
  local v = call('HMGET', K .. 'q:' .. queue, 'last', 'interval')
  local interval = math.max(0, NOW - (tonumber(v[1]) or NOW))
  local mean = tonumber(v[2]) or interval
  call('HSET', K .. 'q:' .. queue, 'last', NOW, 'interval', mean + 0.1 * (interval - mean))
end

local function siblings(h)
  if h.num == 1 then return {h.id} end
  local group, ids = string.match(h.id, '^(.*)%.'), {}
  for i = 1, h.num do ids[i] = group .. '.' .. i - 1 end
  return ids
end

-- A group, its logs and its idempotency key are kept from its last end on.
local function keep_for_a_while(h)
  local ended = {}
  for _, rid in ipairs(siblings(h)) do
    local st = call('HGET', K .. 'r:' .. rid, 'st')
    if st == 'e' then
      ended[#ended + 1] = rid
    elseif st then
      call('PEXPIRE', K .. 'o:' .. h.id, call('PTTL', K .. 'r:' .. h.id)) -- it may consist of this end alone
      return due(h, nil)
    end
  end
  for _, rid in ipairs(ended) do
    call('ZADD', K .. 'due', NOW + h.keep, rid)
    for _, kind in ipairs({'r:', 'o:'}) do call('PEXPIRE', K .. kind .. rid, h.keep + SLACK_MS) end
  end
  if h.idem then call('PEXPIRE', h.idem, h.keep + SLACK_MS) end
end

-- `raw` is the terminal entry; what it holds of ids is already counted in h.n. `reason` is in it.
local function terminal(h, raw, reason)
  if h.st == 'w' then
    dequeue(h)
  else
    leave_worker(h)
    measure_end(h.q)
  end
  local timings = (h.qms or '-') .. ' ' .. (h.ft or '-') .. ' ' .. (NOW - h.t0)
  call('XADD', K .. 'o:' .. h.id, h.n .. '-2', 'e', raw, 't', timings)
  set(h, 'st', 'e', 'n', h.n)
  call('ZREM', K .. 'orphan', h.id)
  call('HINCRBY', K .. 't:' .. h.tn, 'open', -1)
  bump(h.q, 'end:' .. reason, 1)
  keep_for_a_while(h)
  frame(h.mb, h.id, raw, timings)
end

local function finish(h, reason, stop, err)
  terminal(h, cmsgpack.pack({1, h.n, {}, {}, {reason, stop or false, err or false}}), reason)
end

-- why: 'c' cancelled, 't' out of time
local function end_by(h, why)
  if why == 'c' then return finish(h, 'cancelled') end
  finish(h, 'timeout', h.st == 'w' and not h.qms and h.qd and h.qd <= NOW and (not h.dl or h.qd <= h.dl)
    and 'queue_timeout_s' or 'timeout_s')
end

-- End what waits; what runs ends at its worker's next commit, for the first of the reasons.
local function doom(h, why)
  if h.st == 'w' then
    end_by(h, why)
  elseif h.st == 'r' and not h.cx then
    set(h, 'cx', why)
    call('PUBLISH', K .. 'work:' .. h.wk, h.id)
  end
end

local function crash(h, count)
  if h.cx then return end_by(h, h.cx) end
  if h.c > 0 and h.n <= h.cn + UNSEEN then
    h.c = h.c + count
  else
    h.c, h.cn = count, h.n
  end
  set(h, 'c', h.c, 'cn', h.cn)
  if h.c < GUILTY and h.at < MAX_ATTEMPTS then return requeue(h) end
  call('XADD', K .. 'dead', 'MAXLEN', '~', 1000, '*', 'id', h.id, 'n', h.n, 'attempts', h.at, 'worker', h.wk)
  finish(h, 'error', nil, POISON)
end

local function lose_worker(name, count)
  local num = 0
  for _, rid in ipairs(call('SMEMBERS', K .. 'held:' .. name)) do
    local h = record(rid)
    if h and h.st == 'r' and h.wk == name then
      crash(h, count)
      num = num + 1
    end
  end
  call('DEL', K .. 'held:' .. name, K .. 'w:' .. name)
  call('ZREM', K .. 'workers', name)
  return num
end

-- the HTTP half --------------------------------------------------------------------------------------------------------

-- r: rid, payload, size (prompt tokens), cost, then milliseconds from now, or empty: deadline, queue deadline, orphan
-- time; and the size of its group. `num` ids it has already, in the entry `raw`.
local function admit(queue, tenant, class, weight, keep, mb, idem, r, num, raw)
  local q, t, v, f = K .. 'q:' .. queue, K .. 't:' .. tenant, 'v' .. class, queue .. class
  local tag = math.max(tonumber(call('HGET', q, v)) or 0, tonumber(call('HGET', t, f)) or 0)
  local h = {id = r[1], st = 'w', q = queue, cl = class, tag = tag, size = tonumber(r[3]), t0 = NOW}
  h.dl, h.qd, h.orphan = tonumber(r[5]), num == 0 and tonumber(r[6]) or nil, tonumber(r[7]) -- with ids it was claimed
  h.dl, h.qd = h.dl and NOW + h.dl, h.qd and NOW + h.qd
  set(h, 'st', 'w', 'lk', '', 'wk', '', 'n', num, 'p', r[2], 'q', queue, 'tn', tenant, 'cl', class, 'tag', tag, 'size',
    h.size, 't0', NOW, 'dl', h.dl or '', 'qd', h.qd or '', 'orphan', h.orphan or '', 'keep', keep, 'c', 0, 'cn', 0,
    'at', 0, 'mb', mb, 'num', r[8])
  if idem then set(h, 'idem', idem) end
  call('PEXPIRE', K .. 'r:' .. h.id, WEEK_MS) -- not by its deadline: real expiry follows a clock that may step
  if num > 0 then
    call('XADD', K .. 'o:' .. h.id, num .. '-1', 'e', raw)
    call('PEXPIRE', K .. 'o:' .. h.id, WEEK_MS)
  end
  local finish_tag = tag + r[4] / weight
  call('HSET', t, f, finish_tag)
  if (tonumber(call('HGET', q, 'm' .. class)) or 0) < finish_tag then call('HSET', q, 'm' .. class, finish_tag) end
  call('HINCRBY', t, 'open', 1)
  bump(queue, 'in', 1)
  due(h, waiting_deadline(h))
  if h.orphan then call('ZADD', K .. 'orphan', NOW + h.orphan, h.id) end
  enqueue(h)
  call('PEXPIRE', q, WEEK_MS)
  call('PEXPIRE', t, WEEK_MS)
end

local function state(queue)
  local v = call('HMGET', K .. 'q:' .. queue, 'tokens', 'running', 'interval')
  local waiting = call('ZCARD', K .. 'wait:' .. queue)
  local retry_s = math.min(60, math.max(1, math.ceil(waiting * (tonumber(v[3]) or 0) / 1000)))
  return waiting, tonumber(v[1]) or 0, tonumber(v[2]) or 0, retry_s
end

-- a: queue, most waiting, most waiting tokens, tenant, class, weight, keep, key name or '', key body, group; then eight
-- for each request (see admit)
local function submit(keys, a)
  begin(keys)
  local queue, tenant, class = a[1], a[4], a[5]
  local idem = a[8] ~= '' and K .. 'idem:' .. tenant .. ':' .. a[8]
  if idem then
    local known = call('HMGET', idem, 'id', 'body')
    if known[1] then return known[2] == a[9] and {'found', known[1]} or {'conflict'} end
  end
  if call('EXISTS', K .. 'r:' .. a[11]) == 1 then return {'found', a[10]} end
  local num, size = (#a - 10) / 8, 0
  for i = 0, num - 1 do size = size + a[13 + 8 * i] end
  local waiting, tokens, running, retry_s = state(queue)
  if waiting > 0 and (waiting + num > tonumber(a[2]) or tokens + size > tonumber(a[3])) then
    return {'full', waiting, retry_s}
  end
  if waiting == 0 and running == 0 then call('HSET', K .. 'q:' .. queue, 'last', NOW) end
  for i = 0, num - 1 do
    local r = {unpack(a, 11 + 8 * i, 18 + 8 * i)}
    admit(queue, tenant, class, a[6], tonumber(a[7]), '', idem, r, 0)
  end
  if idem then
    call('HSET', idem, 'id', a[10], 'body', a[9])
    call('PEXPIRE', idem, WEEK_MS)
  end
  local before = call('ZRANK', K .. 'rdy:' .. queue .. ':' .. class, a[11])
  if class == 'b' then before = before + call('ZCARD', K .. 'rdy:' .. queue .. ':a') end
  return {'ok', a[10], before}
end

-- a: queue, tenant, class, weight, keep, mailbox, then one request (see admit), ids so far, their entry
local function restore(keys, a)
  begin(keys)
  if call('EXISTS', K .. 'r:' .. a[7]) == 1 then return 0 end
  admit(a[1], a[2], a[3], a[4], tonumber(a[5]), a[6], nil, {unpack(a, 7, 14)}, tonumber(a[15]), a[16])
  return 1
end

local function add_reader(rid, mb, api)
  for known in string.gmatch(mb, '%S+') do
    if known == api then return end
  end
  call('HSET', K .. 'r:' .. rid, 'mb', mb == '' and api or mb .. ' ' .. api)
end

-- All of a group or nothing: after a loss its sequences come back one by one.
local function lookup(keys, a) -- group, tenant
  begin(keys)
  local v = call('HMGET', K .. 'r:' .. a[1], 'tn', 'p', 'num')
  if v[1] then return v[1] == a[2] and v[3] == '1' and {v[2]} or {} end
  local found = {}
  repeat
    v = call('HMGET', K .. 'r:' .. a[1] .. '.' .. #found, 'tn', 'p', 'num')
    if v[1] ~= a[2] then return {} end
    found[#found + 1] = v[2]
  until #found == tonumber(v[3])
  return found
end

-- From here on the mailbox of `api` gets every entry; the reply has those that there were already: payload, queue, then
-- of each entry past `known` ids its bytes and its timings; of what has ended the end at least, should the log have
-- lost ids before it.
local function attach(keys, a) -- rid, tenant, api, known
  begin(keys)
  local v = call('HMGET', K .. 'r:' .. a[1], 'tn', 'p', 'st', 'orphan', 'mb', 'q', 'n')
  if v[1] ~= a[2] then return {} end
  if v[3] ~= 'e' then
    add_reader(a[1], v[5], a[3])
    if v[4] ~= '' then call('ZADD', K .. 'orphan', NOW + v[4], a[1]) end
  end
  local reply, log = {v[2], v[6]}, K .. 'o:' .. a[1]
  local found = call('XRANGE', log, '(' .. (a[4] or 0) .. '-1', '+')
  if #found == 0 and v[3] == 'e' then found = call('XRANGE', log, v[7] .. '-2', '+') end
  for _, item in ipairs(found) do
    reply[#reply + 1] = item[2][2]
    reply[#reply + 1] = item[2][4] or ''
  end
  return reply
end

-- These are being read: they are no orphans. Tells of each how many ids its log has (-1: unknown) and whether it ended.
local function attend(keys, a) -- api, then rids
  begin(keys)
  local reply = {}
  for i = 2, #a do
    local v = call('HMGET', K .. 'r:' .. a[i], 'n', 'st', 'orphan', 'mb')
    if v[1] and v[2] ~= 'e' then
      add_reader(a[i], v[4], a[1])
      if v[3] ~= '' then call('ZADD', K .. 'orphan', NOW + v[3], a[i]) end
    end
    reply[#reply + 1] = tonumber(v[1] or -1)
    reply[#reply + 1] = v[2] == 'e' and 1 or 0
  end
  return reply
end

-- a: rid, number of ids, their entry, '1' if the log differs. Whoever computes it now has begun elsewhere: fenced.
local function heal(keys, a)
  begin(keys)
  local h, num = record(a[1]), tonumber(a[2])
  if not h then return -1 end
  if h.st == 'e' or h.n >= num and a[4] ~= '1' then return 0 end
  local log, ttl = K .. 'o:' .. h.id, call('PTTL', K .. 'r:' .. h.id)
  call('DEL', log)
  call('XADD', log, num .. '-1', 'e', a[3])
  call('PEXPIRE', log, ttl)
  set(h, 'n', num)
  h.n = num
  if h.st == 'r' and h.cx then
    end_by(h, h.cx)
  elseif h.st == 'r' then
    requeue(h)
  end
  return flush(1)
end

local function cancel(keys, a) -- rid, tenant
  begin(keys)
  local h = record(a[1])
  if h and h.tn == a[2] then doom(h, 'c') end
  return flush(1)
end

-- Place in the queue (-1: it does not wait), prompt tokens computed under the present claim, then the log as attach has it.
local function peek(keys, a) -- rid, tenant
  begin(keys)
  local v = call('HMGET', K .. 'r:' .. a[1], 'tn', 'st', 'q', 'cl', 'lk', 'pc')
  if v[1] ~= a[2] then return {} end
  local reply = {-1, 0}
  if v[2] == 'w' then
    reply[1] = call('ZRANK', K .. 'rdy:' .. v[3] .. ':' .. v[4], a[1])
    if v[4] == 'b' then reply[1] = reply[1] + call('ZCARD', K .. 'rdy:' .. v[3] .. ':a') end
  elseif v[2] == 'r' and v[6] then
    local token, num = string.match(v[6], '^(%S+) (%d+)$')
    if token == v[5] then reply[2] = tonumber(num) end
  end
  for _, item in ipairs(call('XRANGE', K .. 'o:' .. a[1], '-', '+')) do
    reply[#reply + 1] = item[2][2]
    reply[#reply + 1] = item[2][4] or ''
  end
  return reply
end

local REASONS = {'stop', 'length', 'cancelled', 'timeout', 'error'} -- in the order of model/request.py

local function load(keys, a) -- queue; with anything after it also the books: accepted, then ended for each reason
  begin(keys)
  local waiting, tokens, running, retry_s = state(a[1])
  local oldest = call('ZRANGE', K .. 'wait:' .. a[1], 0, 0, 'WITHSCORES')
  local reply = {waiting, tokens, running, retry_s, oldest[2] and NOW - oldest[2] or 0}
  if not a[2] then return reply end
  reply[6] = tonumber(call('HGET', K .. 'q:' .. a[1], 'in')) or 0
  for i, reason in ipairs(REASONS) do
    reply[6 + i] = tonumber(call('HGET', K .. 'q:' .. a[1], 'end:' .. reason)) or 0
  end
  return reply
end

local function workers(keys)
  begin(keys)
  local found = {}
  for _, name in ipairs(call('ZRANGEBYSCORE', K .. 'workers', '(' .. NOW, '+inf')) do
    local info = call('HGET', K .. 'w:' .. name, 'info')
    if info then found[#found + 1] = info end
  end
  return found
end

-- the worker -----------------------------------------------------------------------------------------------------------

local function renew(name, lease_ms)
  call('ZADD', K .. 'workers', NOW + lease_ms, name)
  call('PEXPIRE', K .. 'w:' .. name, WEEK_MS)
  call('PEXPIRE', K .. 'held:' .. name, WEEK_MS)
end

local function level(c) return math.min(math.floor(c / 3), #SUSPECTS) end

-- How many more requests of each level and above this worker may hold.
local function suspicion(name)
  local left = {unpack(SUSPECTS)}
  for _, rid in ipairs(call('SMEMBERS', K .. 'held:' .. name)) do
    local c = tonumber(call('HGET', K .. 'r:' .. rid, 'c') or 0)
    for k = 1, level(c) do left[k] = left[k] - 1 end
  end
  return left
end

local function may_take(h, left)
  for k = 1, level(h.c) do
    if left[k] < 1 then return false end
  end
  for k = 1, level(h.c) do left[k] = left[k] - 1 end
  return true
end

local function take(h, name, token)
  dequeue(h)
  h.qms = h.qms or NOW - h.t0
  set(h, 'st', 'r', 'lk', token, 'wk', name, 'at', h.at + 1, 'qms', h.qms)
  due(h, h.dl)
  bump(h.q, 'running', 1)
  call('SADD', K .. 'held:' .. name, h.id)
  local v = 'v' .. h.cl
  if (tonumber(call('HGET', K .. 'q:' .. h.q, v)) or 0) < h.tag then call('HSET', K .. 'q:' .. h.q, v, h.tag) end
end

local function job(rid)
  local v = call('HMGET', K .. 'r:' .. rid, 'p', 'at')
  local found = {rid, v[1], tonumber(v[2])}
  for _, item in ipairs(call('XRANGE', K .. 'o:' .. rid, '-', '+')) do found[#found + 1] = item[2][2] end
  return found
end

-- The next to be claimed of two sorted lists, taken off its list: `ahead`, unless the other head is that much older.
local function next_of(ahead, rest)
  local list = ahead[ahead.at] and ahead or rest
  if ahead[ahead.at] and rest[rest.at] then
    local first = tonumber(call('HGET', K .. 'r:' .. ahead[ahead.at], 't0'))
    local second = tonumber(call('HGET', K .. 'r:' .. rest[rest.at], 't0'))
    if second + AGEING_MS <= first then list = rest end
  end
  list.at = list.at + 1
  return list[list.at - 1]
end

local function claim(keys, a) -- worker, queue, token of this claim, room, lease
  begin(keys)
  local name, queue, token, room = a[1], a[2], a[3], tonumber(a[4])
  local jobs = {}
  local last = call('HMGET', K .. 'w:' .. name, 'claim', 'jobs')
  if last[1] == token then -- asked again, since the reply was lost
    for rid in string.gmatch(last[2], '%S+') do
      local v = call('HMGET', K .. 'r:' .. rid, 'st', 'lk')
      if v[1] == 'r' and v[2] == token then jobs[#jobs + 1] = job(rid) end
    end
    return jobs
  end
  local ahead = call('ZRANGE', K .. 'rdy:' .. queue .. ':a', 0, SCAN + room)
  local rest = call('ZRANGE', K .. 'rdy:' .. queue .. ':b', 0, SCAN + room)
  ahead.at, rest.at = 1, 1
  local left, rids = nil, {}
  while #jobs < room do
    local rid = next_of(ahead, rest)
    if not rid then break end
    local h = record(rid)
    local deadline = waiting_deadline(h)
    if deadline and deadline <= NOW then
      end_by(h, 't')
    else
      if h.c > 0 then left = left or suspicion(name) end
      if h.c == 0 or may_take(h, left) then
        take(h, name, token)
        jobs[#jobs + 1], rids[#rids + 1] = job(rid), rid
      end
    end
  end
  if #jobs > 0 then call('HSET', K .. 'w:' .. name, 'claim', token, 'jobs', table.concat(rids, ' ')) end
  renew(name, a[5]) -- or a worker that was given up, and dies before its next heartbeat, would keep these for ever
  return flush(jobs)
end

local function append(rid, v, n, num, raw)
  local key, ft = K .. 'r:' .. rid, v[8]
  if n == num then call('PEXPIRE', K .. 'o:' .. rid, call('PTTL', key)) end
  if not ft then
    call('HSET', key, 'n', n, 'ft', NOW - v[9])
  elseif tonumber(v[6]) > 0 and n >= v[7] + CLEARED then
    call('HSET', key, 'n', n, 'c', 0)
  else
    call('HSET', key, 'n', n)
  end
  frame(v[10], rid, raw, '')
end

-- What becomes of one request's part of a step: 1 written, -1 fenced, -2 cancelled, -3 out of time.
local function commit_one(rid, token, start, num, raw, final)
  local v = call('HMGET', K .. 'r:' .. rid, 'st', 'lk', 'n', 'cx', 'dl', 'c', 'cn', 'ft', 't0', 'mb')
  if v[1] ~= 'r' or v[2] ~= token then return -1 end
  local why = v[4] or v[5] ~= '' and tonumber(v[5]) <= NOW and 't'
  if why then
    end_by(record(rid), why)
    return why == 'c' and -2 or -3
  elseif start ~= tonumber(v[3]) then
    requeue(record(rid))
    return -1
  elseif final then
    local h = record(rid)
    h.n = h.n + num
    if not h.ft and num > 0 then
      h.ft = NOW - h.t0
      set(h, 'ft', h.ft)
    end
    terminal(h, raw, cmsgpack.unpack(raw)[5][1])
  elseif num > 0 then
    local n = start + num
    call('XADD', K .. 'o:' .. rid, n .. '-1', 'e', raw)
    append(rid, v, n, num, raw)
  end
  return 1
end

-- a: worker, lease, number of this commit, and packed, for each request: rid, token, start, number of ids, entry, final.
-- Packed, since six times as many arguments would cost the caller more than all the rest.
local function commit(keys, a)
  begin(keys)
  local w = K .. 'w:' .. a[1]
  local last, codes = call('HMGET', w, 'seq', 'codes'), {}
  if last[1] == a[3] then -- asked again, since the reply was lost
    for code in string.gmatch(last[2], '%S+') do codes[#codes + 1] = tonumber(code) end
    return codes
  end
  for _, delta in ipairs(cmsgpack.unpack(a[4])) do codes[#codes + 1] = commit_one(unpack(delta)) end
  call('HSET', w, 'seq', a[3], 'codes', table.concat(codes, ' '))
  renew(a[1], a[2])
  return flush(codes)
end

local function beat(keys, a) -- worker, lease, info, then rid and token of what it holds; tells of each as commit does
  begin(keys)
  call('HSET', K .. 'w:' .. a[1], 'info', a[3])
  renew(a[1], a[2])
  local codes = {}
  for i = 4, #a, 2 do
    local v = call('HMGET', K .. 'r:' .. a[i], 'st', 'lk', 'cx')
    local held = v[1] == 'r' and v[2] == a[i + 1]
    codes[#codes + 1] = not held and -1 or v[3] == 'c' and -2 or v[3] and -3 or 1
  end
  return codes
end

-- How far prompts have come. Nothing depends on it but what waiting clients are shown.
local function progress(keys, a) -- rid, token and number of tokens of each
  begin(keys)
  for i = 1, #a, 3 do
    local key = K .. 'r:' .. a[i]
    if call('HGET', key, 'lk') == a[i + 1] then call('HSET', key, 'pc', a[i + 1] .. ' ' .. a[i + 2]) end
  end
  return 1
end

local function give_up(keys, a, how) -- rid and token
  begin(keys)
  for i = 1, #a, 2 do
    local h = record(a[i])
    if h and h.st == 'r' and h.lk == a[i + 1] then how(h) end
  end
  return flush(1)
end

local function release(keys, a)
  return give_up(keys, a, function(h)
    if h.cx then return end_by(h, h.cx) end
    set(h, 'at', h.at - 1)
    requeue(h)
  end)
end

local function abandon(keys, a)
  return give_up(keys, a, function(h) crash(h, CRASHED) end)
end

local function lose(keys, a) -- worker: it is dead; '1' if it failed by itself, and was not killed
  begin(keys)
  return flush(lose_worker(a[1], a[2] == '1' and CRASHED or LOST))
end

-- the clock's work, done by anyone, often ----------------------------------------------------------------------------

local function come_due(rid)
  local h = record(rid)
  if not h then return call('ZREM', K .. 'due', rid) end
  if h.st == 'e' then
    call('DEL', K .. 'r:' .. rid, K .. 'o:' .. rid)
    if h.idem then call('DEL', h.idem) end
    call('ZREM', K .. 'due', rid)
  elseif h.st == 'r' and not call('ZSCORE', K .. 'workers', h.wk) then
    end_by(h, 't') -- nobody is left to commit it
  else
    due(h, NOW + TICK_MS) -- tell its worker again, should it not have heard
    doom(h, 't')
  end
end

local function reap(keys)
  begin(keys)
  for _, name in ipairs(call('ZRANGEBYSCORE', K .. 'workers', '-inf', NOW)) do lose_worker(name, LOST) end
  for _, rid in ipairs(call('ZRANGEBYSCORE', K .. 'due', '-inf', NOW, 'LIMIT', 0, SCAN)) do come_due(rid) end
  for _, rid in ipairs(call('ZRANGEBYSCORE', K .. 'orphan', '-inf', NOW, 'LIMIT', 0, SCAN)) do
    call('ZREM', K .. 'orphan', rid)
    local h = record(rid)
    if h then doom(h, 'c') end
  end
  return flush(1)
end

local function register(name, callback, ...)
  redis.register_function{function_name = 'millrace1_' .. name, callback = callback, flags = {...}}
end

-- A request that is running shall finish even where memory has run out; only new ones are refused then, as a whole.
register('submit', submit)
register('restore', restore)
register('lookup', lookup, 'allow-oom')
register('attach', attach, 'allow-oom')
register('attend', attend, 'allow-oom')
register('heal', heal, 'allow-oom')
register('cancel', cancel, 'allow-oom')
register('peek', peek, 'allow-oom')
register('load', load, 'allow-oom')
register('workers', workers, 'allow-oom')
register('claim', claim, 'allow-oom')
register('commit', commit, 'allow-oom')
register('beat', beat, 'allow-oom')
register('progress', progress, 'allow-oom')
register('release', release, 'allow-oom')
register('abandon', abandon, 'allow-oom')
register('lose', lose, 'allow-oom')
register('reap', reap, 'allow-oom')
