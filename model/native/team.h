// Threads that compute a step together. All run the same function; `each` deals out the tasks of one phase of it.
//
// A barrier spins briefly, then yields, then sleeps: with other processes on the same cores, a thread that spins keeps
// the very one away that it waits for.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Team {
public:
    explicit Team(int num) : num_(num < 1 ? 1 : num), taken_(new Counter[num_]) {
        for (int me = 1; me < num_; ++me) threads_.emplace_back([this, me] { work(me); });
    }
    ~Team() {
        ending_ = true;
        pass();
        for (auto& thread : threads_) thread.join();
        delete[] taken_;
    }
    int num() const { return num_; }

    // Call job(me) in every thread; back when all are done.
    void run(const std::function<void(int)>& job) {
        job_ = &job;
        pass();
        job(0);
        pass();
    }

    // Within a job: f(task) once for each task below `count`. Every thread has its own share, neighbours in memory, and
    // helps the others when it is done. All tasks are done when it returns.
    template <class F> void each(int me, int count, const F& f) {
        for (int i = 0; i < num_; ++i) {
            int owner = (me + i) % num_;
            int begin = int(int64_t(count) * owner / num_), end = int(int64_t(count) * (owner + 1) / num_);
            for (;;) {
                int task = begin + taken_[owner].value.fetch_add(1, std::memory_order_relaxed);
                if (task >= end) break;
                f(task);
            }
        }
        pass();
    }

private:
    struct alignas(64) Counter { std::atomic<int> value{0}; };
    static constexpr int SPINS = 300, YIELDS = 100;

    void work(int me) {
        for (;;) {
            pass();
            if (ending_) return;
            (*job_)(me);
            pass();
        }
    }

    // The barrier. The last to arrive clears the counters for the next phase.
    void pass() {
        if (num_ == 1) {
            taken_[0].value.store(0, std::memory_order_relaxed);
            return;
        }
        unsigned seen = generation_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            for (int i = 0; i < num_; ++i) taken_[i].value.store(0, std::memory_order_relaxed);
            generation_.store(seen + 1, std::memory_order_seq_cst);
            if (num_asleep_.load(std::memory_order_seq_cst)) {
                std::lock_guard<std::mutex> lock(mutex_);
                wake_.notify_all();
            }
            return;
        }
        for (int i = 0; i < SPINS; ++i) {
            if (generation_.load(std::memory_order_acquire) != seen) return;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        for (int i = 0; i < YIELDS; ++i) {
            if (generation_.load(std::memory_order_acquire) != seen) return;
            std::this_thread::yield();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        num_asleep_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
        num_asleep_.fetch_sub(1, std::memory_order_relaxed);
    }

    const int num_;
    Counter* taken_;
    alignas(64) std::atomic<unsigned> generation_{0};
    alignas(64) std::atomic<int> arrived_{0};
    std::atomic<int> num_asleep_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* job_ = nullptr;
    bool ending_ = false;
    std::vector<std::thread> threads_;
};
