// Threads that compute a step together. All run the same function; `each` deals out the tasks of one phase of it.
//
// A phase is over when its tasks are done, not when every thread has come by: on a machine with other processes a
// thread may be put aside at any time, and then the others go on without it. It finds nothing left to do and catches
// up. Who waits spins briefly, then yields, then sleeps, so that it does not keep away the one that it waits for.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

class Team {
    static constexpr int MOST_SHARES = 15, SPINS = 300, YIELDS = 100;

    struct alignas(64) Phase {
        std::atomic<int> num_done{0};
        std::atomic<int> taken[MOST_SHARES]{};  // of each share of the tasks
    };

public:
    struct Job;
    struct Member {  // one thread within a job
        Job& job;
        int me, phase = 0;
        const char *ahead = nullptr, *ahead_end = nullptr;  // memory that it reads next: asked for while it waits

        bool fetch() {
            if (ahead == ahead_end) return false;
            for (int i = 0; i < 4 && ahead < ahead_end; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            if (ahead > ahead_end) ahead = ahead_end;
            return true;
        }
    };
    // A thread that was put aside may still hold a job that is long over: it must own all that `body` reads between
    // tasks.
    struct Job {
        std::function<void(Member&)> body;
        std::vector<Phase> phases;
    };

    explicit Team(int num) : num_(num < 1 ? 1 : num) {
        for (int me = 1; me < num_; ++me) threads_.emplace_back([this, me] { work(me); });
    }
    ~Team() {
        ending_ = true;
        publish(nullptr);
        for (auto& thread : threads_) thread.join();
    }
    int num() const { return num_; }

    // Call body(member) in every thread that is free; back when all of its phases, at most `num_phases`, are over.
    void run(int num_phases, std::function<void(Member&)> body) {
        auto job = std::make_shared<Job>(Job{std::move(body), std::vector<Phase>(num_phases)});
        publish(job);
        Member member{*job, 0};
        job->body(member);
        std::lock_guard<std::mutex> lock(mutex_);
        job_ = nullptr;
    }

    // Within a job: f(task) once for each task below `count`. Every thread has its own share, neighbours in memory, and
    // helps the others when it is through. All tasks are done when it returns.
    template <class F> void each(Member& member, int count, const F& f) {
        Phase& phase = member.job.phases[member.phase++];
        int shares = num_ < MOST_SHARES ? num_ : MOST_SHARES, done = 0;
        for (int i = 0; i < shares; ++i) {
            int owner = (member.me + i) % shares;
            int begin = int(int64_t(count) * owner / shares), end = int(int64_t(count) * (owner + 1) / shares);
            while (phase.taken[owner].load(std::memory_order_relaxed) < end - begin) {
                int task = begin + phase.taken[owner].fetch_add(1, std::memory_order_relaxed);
                if (task >= end) break;
                f(task);
                ++done;
            }
        }
        if (done && phase.num_done.fetch_add(done) + done == count) wake();
        wait([&] { return phase.num_done.load() >= count; }, &member);
    }

private:
    void work(int me) {
        for (unsigned seen = 0;;) {
            wait([&] { return generation_.load() != seen; });
            std::shared_ptr<Job> job;
            {
                std::lock_guard<std::mutex> lock(mutex_);
                seen = generation_.load();
                if (ending_) return;
                job = job_;
            }
            if (!job) continue;
            Member member{*job, me};
            job->body(member);
        }
    }

    void publish(std::shared_ptr<Job> job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = std::move(job);
            generation_.fetch_add(1);
        }
        wake();
    }

    void wake() {
        if (num_asleep_.load() == 0) return;
        std::lock_guard<std::mutex> lock(mutex_);
        woken_.notify_all();
    }

    template <class Ready> void wait(const Ready& ready, Member* member = nullptr) {
        for (int i = 0; i < SPINS; ++i) {
            if (ready()) return;
            if (member && member->fetch()) continue;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        for (int i = 0; i < YIELDS; ++i) {
            if (ready()) return;
            std::this_thread::yield();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        num_asleep_.fetch_add(1);  // before the last look, so that whoever makes it ready sees a sleeper
        woken_.wait(lock, ready);
        num_asleep_.fetch_sub(1);
    }

    const int num_;
    std::atomic<bool> ending_{false};
    alignas(64) std::atomic<unsigned> generation_{0};
    std::atomic<int> num_asleep_{0};
    std::mutex mutex_;
    std::condition_variable woken_;
    std::shared_ptr<Job> job_;
    std::vector<std::thread> threads_;
};
